"""Search: model + template + Profile -> a measured Pareto
front of recipes, through the runtime that ships."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvtune.cache import weigh
from kvtune.errors import UsageError, suggest
from kvtune.files import canonical_json, sha256_bytes, write_atomic
from kvtune.measure import Bench
from kvtune.models import Facts
from kvtune.parts import Chain
from kvtune.profile import Profile
from kvtune.recipe import Policy
from kvtune.space import SIDES, Opened, Side
from kvtune.study import Choice, Outcome, Row, Seeded, Space, run
from kvtune.surrogate import Assignment, Surrogate

T = TypeVar("T")
OBJECTIVES = ("memory", "accuracy")
STUDY = "kvtune"
START = "start"
STEPS = {"cheaper": -1, "same": 0, "dearer": 1}


@dataclass(frozen=True)
class Goal:
    """What the search is for: objectives, and the context
    length and batch at which bytes are counted."""

    objectives: tuple[str, ...] = OBJECTIVES
    context: int = 32768
    batch: int = 1
    budgets: int = 18  # points of the surrogate front
    rivals: int = 8  # uniform recipes measured beside it
    clusters: int = 4  # per side

    @classmethod
    def parse(cls, objectives: str, context: int, batch: int) -> Goal:
        """Reads `memory,accuracy`; UsageError for anything else."""
        wanted = tuple(word.strip() for word in objectives.split(","))
        for word in wanted:
            if word not in OBJECTIVES:
                raise UsageError(f"There is no objective {word!r}.", suggest(word, OBJECTIVES))
        if len(set(wanted)) != len(wanted) or len(wanted) < 2:
            raise UsageError(
                f"--objective {objectives}: give memory,accuracy (a front needs both, each once)."
            )
        return cls(wanted, context, batch)


class Search:
    """One search: the surrogate of a profile, the space around
    its front, and the trials on a bench."""

    def __init__(
        self, bench: Bench, profile: Profile, choices: Mapping[int, Opened], goal: Goal
    ) -> None:
        self.bench, self.profile, self.choices, self.goal = bench, profile, choices, goal
        self.known: Facts = bench.bank.facts

    def prepare(self, folder: Path) -> None:
        """Rescales the price table by measured whole-model recipes
        and lays out the space; kept for a resume."""
        self._layout(scales=self._scales(folder / "surrogate.json"))

    def run(
        self,
        storage: str,
        trials: int,
        seed: int,
        resume: bool = False,
        seconds: float | None = None,
        on_trial: Callable[[Row, int], None] | None = None,
    ) -> list[Row]:
        """Runs or resumes the study; returns all its rows."""
        return run(
            storage,
            STUDY,
            self.space,
            self.starts,
            self.evaluate,
            objectives=self.goal.objectives,
            trials=max(trials, len(self.starts)),
            seed=seed,
            seconds=seconds,
            resume=resume,
            context=self._binding(),
            on_trial=on_trial,
        )

    def evaluate(self, choice: Choice) -> Outcome:
        """Measures one configuration: true bytes and mean KL on the search text."""
        policies = self.policies(choice)
        means = self.bench.measure(policies).means()
        weight = weigh(policies, self.known, self.goal.context, self.goal.batch)
        values = {"memory": float(weight.bytes), "accuracy": means["kl"]}
        predicted = self.surrogate.predict(self.assignment(choice))[1]
        attrs = {
            "flips": means["flips"],
            "dnll": means["dnll"],
            "bits": weight.bits,
            "predicted": predicted,
        }
        return Outcome(tuple(values[name] for name in self.goal.objectives), attrs)

    def assignment(self, choice: Choice) -> Assignment:
        """The settings that a choice stands for: a start, with some
        clusters moved along their ladders."""
        chosen = self.bases[choice[START]]
        for name, places in self.clusters.items():
            chosen = (
                self.surrogate.moved(chosen, places, STEPS[choice[name]])
                if STEPS[choice[name]]
                else chosen
            )
        return chosen

    def policies(self, choice: Choice) -> tuple[Policy, ...]:
        """The policies that a choice stands for."""
        return self._policies(self.assignment(choice))

    def _policies(self, chosen: Assignment) -> tuple[Policy, ...]:
        return tuple(
            self.choices[i].policy(chosen[i, "keys"], chosen[i, "values"])
            if i in self.choices
            else Policy()
            for i in range(len(self.known.layers))
        )

    def _layout(self, scales: Mapping[Side, float]) -> None:
        self.surrogate = Surrogate.of(
            self.choices, self.profile, self.known, self.goal.context, scales
        )
        self.clusters = self.surrogate.clusters(self.goal.clusters)
        self.bases = _distinct({**self._uniforms(), **self._protected(), **self._fronts()})
        still = dict.fromkeys(self.clusters, "same")
        moves = {name: tuple(STEPS) for name in self.clusters}
        self.space = Space({START: tuple(self.bases), **moves})
        self.starts = [Seeded(name, {START: name, **still}) for name in self.bases]

    def _fronts(self) -> dict[str, Assignment]:
        budgets = self.surrogate.budgets(self.goal.budgets)
        return {
            f"knapsack {i:02}": self.surrogate.cheapest(budget) for i, budget in enumerate(budgets)
        }

    def _uniforms(self) -> dict[str, Assignment]:
        """Uniform recipes on their own predicted front: what a user would try by hand."""
        every = uniforms(self.choices)
        kept: list[str] = []
        best = float("inf")
        for _, kl, name in sorted(
            (*self.surrogate.predict(uniform), name) for name, uniform in every.items()
        ):
            if kl < best:
                kept.append(name)
                best = kl
        return {name: every[name] for name in spread(kept, self.goal.rivals)}

    def _protected(self) -> dict[str, Assignment]:
        """A middling uniform recipe with the first and last two
        layers at their dearest setting: the rule of thumb."""
        named = list(self._uniforms().items())
        layers = sorted(self.choices)
        ends = {*layers[:2], *layers[-2:]}
        found = {}
        for name, uniform in named[len(named) // 3 : len(named) // 3 + 1]:
            safe = {
                place: self.surrogate.ladders[place][-1].chain
                for place in uniform
                if place[0] in ends
            }
            found[f"ends protected, {name}"] = {**uniform, **safe}
        return found

    def _scales(self, kept: Path) -> dict[Side, float]:
        """How much the measured KL of a side exceeds its priced
        sum, over two uniform recipes of few bits."""
        if kept.is_file():
            held = json.loads(kept.read_text())
            if held.get("binding") == self._binding():
                return dict(held["scales"])
        self._layout({})
        scales: dict[Side, float] = {side: self._scale(side) for side in SIDES}
        write_atomic(kept, json.dumps({"binding": self._binding(), "scales": scales}).encode())
        return scales

    def _scale(self, side: Side) -> float:
        product = 1.0
        probes = _cheap_chains(self.choices, self.surrogate, side)
        for chain in probes:
            policies = [Policy()] * len(self.known.layers)
            for layer, own in self.choices.items():
                policies[layer] = own.cell(side, chain)
            measured = self.bench.measure(tuple(policies)).means()["kl"]
            priced = sum(
                rung.price
                for (_, s), rungs in self.surrogate.rungs.items()
                if s == side
                for rung in rungs
                if rung.chain == chain
            )
            product *= measured / priced
        return product ** (1 / len(probes)) if probes else 1.0

    def _binding(self) -> str:
        """What a study belongs to: model, texts, space and goal."""
        cells = [
            [cell.layer, cell.side, cell.setting, cell.sinks, cell.recent]
            for cell in self.profile.cells
        ]
        bound = [
            self.profile.meta.get("fingerprint"),
            self.profile.meta.get("text"),
            sha256_bytes(self.bench.bank.tokens.cpu().numpy().tobytes()),
            cells,
            [f"{price:.9e}" for price in self.profile.prices().values()],
            list(vars(self.goal).values()),
            str(self.bench.model.dtype),
        ]
        return sha256_bytes(canonical_json(bound).encode())


def uniforms(choices: Mapping[int, Opened]) -> dict[str, Assignment]:
    """All recipes that treat every layer alike: each pair of settings that all layers open."""
    first = next(iter(choices.values()))
    shared = {side: _shared(choices, side) for side in SIDES}
    return {
        f"uniform {keys} | {values}": _everywhere(choices, keys, values)
        for keys in first.keys
        if keys in shared["keys"]
        for values in first.values
        if values in shared["values"]
    }


def _everywhere(choices: Mapping[int, Opened], keys: Chain, values: Chain) -> Assignment:
    return {
        (layer, side): keys if side == "keys" else values for layer in choices for side in SIDES
    }


def _shared(choices: Mapping[int, Opened], side: Side) -> set[Chain]:
    return set.intersection(*(set(own.chains(side)) for own in choices.values()))


def _cheap_chains(
    choices: Mapping[int, Opened], surrogate: Surrogate, side: Side
) -> Sequence[Chain]:
    """Two settings that every layer opens: the cheapest, and one a third of the way up."""
    shared = _shared(choices, side)
    place = (next(iter(choices)), side)
    chains = [rung.chain for rung in surrogate.ladders[place] if rung.chain in shared]
    return list(dict.fromkeys((chains[0], chains[len(chains) // 3]))) if chains else []


def _distinct(bases: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Each assignment once, under its first name."""
    found: dict[str, Assignment] = {}
    for name, chosen in bases.items():
        if chosen not in found.values():
            found[name] = chosen
    return found


def spread(items: list[T], most: int) -> list[T]:
    """An even choice of at most `most` items, both ends included."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
