"""Duel: the search against NSGA-II without a surrogate, on one bank, by hypervolume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtune.calibrate import Say, quiet
from kvtune.layout import NEGLIGIBLE, Base
from kvtune.sampling import generator
from kvtune.search import Search
from kvtune.surrogate import Place
from kvtune.tune import Tuner

Point = tuple[float, float]  # true bits, and KL in nats
POPULATION = 50  # Optuna's own
KEPT = (0.1, 0.25, 0.5, 1.0)  # parts of either run whose hypervolume is told


@dataclass(frozen=True)
class Contest:
    """What both searches measured, in their order, and how long they took."""

    ours: tuple[Point, ...]
    rival: tuple[Point, ...]
    seconds: tuple[float, float]
    trials: tuple[int, int]

    def volumes(self, logarithmic: bool) -> list[dict[str, float]]:
        """Hypervolumes of both after parts of their trials, with one reference for all."""
        ours, rival = (_scaled(points, logarithmic) for points in (self.ours, self.rival))
        worst = tuple(max(point[i] for point in (*ours, *rival)) for i in (0, 1))
        rows = []
        for part in KEPT:
            first, second = (points[: math.ceil(part * len(points))] for points in (ours, rival))
            volumes = [hypervolume(points, (worst[0], worst[1])) for points in (first, second)]
            counts = [math.ceil(part * count) for count in self.trials]
            rows.append(
                {
                    "trials": counts[0],
                    "rival_trials": counts[1],
                    "volume": volumes[0],
                    "rival_volume": volumes[1],
                }
            )
        return rows


def contest(tuner: Tuner, rival_trials: int, say: Say = quiet) -> Contest:
    """Runs the tuner's search, then NSGA-II over every layer's settings on the same bank."""
    profile = tuner.profile()
    began = time.perf_counter()
    rows = tuner.search(profile)
    middle = time.perf_counter()
    ours = [
        (float(row.attrs["bits"]), float(row.attrs["kl"]))
        for row in rows
        if "kl" in row.attrs and row.memo_of is None
    ]
    rival = nsga(tuner.searched, rival_trials, tuner.settings.seed, say)
    seconds = middle - began, time.perf_counter() - middle
    return Contest(tuple(ours), tuple(rival), seconds, (len(rows), rival_trials))


def nsga(search: Search, trials: int, seed: int, say: Say = quiet) -> list[Point]:
    """NSGA-II (Deb et al. 2002), Optuna's, with one free choice for each side of each layer.

    It knows neither prices nor ladders; bytes and KL are measured as a trial of ours is.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    window, view = next(iter(search.layout.views.items()))
    options = {place: [rung.chain for rung in found] for place, found in view.whole.rungs.items()}
    draw = generator(seed, 0).getrandbits(32)
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=draw)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    found = []
    for number in range(trials):
        trial = study.ask()
        chosen = {
            place: chains[trial.suggest_categorical(_named(place), range(len(chains)))]
            for place, chains in options.items()
        }
        point = measured(search, Base(window, chosen))
        study.tell(trial, point)
        found.append(point)
        say("NSGA-II", number + 1, trials)
    return found


def measured(search: Search, base: Base) -> Point:
    """True bits and mean KL of a configuration, on all sequences."""
    policies = search.layout.policies(base)
    bits = search.weight(policies).bits
    return bits, search.bench.measure(policies).means()["kl"]


def _named(place: Place) -> str:
    return f"{place.layer} {place.side}"


def _scaled(points: Iterable[Point], logarithmic: bool) -> list[Point]:
    if not logarithmic:
        return list(points)
    return [(math.log(bits), math.log(max(kl, NEGLIGIBLE))) for bits, kl in points]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area that points dominate below a reference, both axes minimised."""
    area, edge = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < edge:
            area += (reference[0] - x) * (edge - y)
            edge = y
    return area
