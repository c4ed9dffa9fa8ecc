"""Search: model + template + Profile -> a measured front, through the runtime that ships."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtune.cache import weigh
from kvtune.errors import IntegrityError, ResourceError
from kvtune.files import canonical_json, sha256_bytes, write_atomic
from kvtune.layout import Goal, Layout, shared
from kvtune.measure import Bench
from kvtune.parts import Chain
from kvtune.profile import Profile
from kvtune.recipe import Policy
from kvtune.space import SIDES, Opened, Side
from kvtune.study import Choice, Outcome, Row, fresh, run
from kvtune.surrogate import Surrogate

STUDY, SCALES = "kvtune", "surrogate.json"


@dataclass(frozen=True)
class Limits:
    """Where a study lives, when its search ends, and what becomes of rows that it has."""

    storage: str  # a database URL, or the path of an SQLite file
    trials: int = 28
    seconds: float | None = None
    resume: bool = True
    anew: bool = False


class Search:
    """One search: the layout around a profile's front, and its trials on a bench."""

    def __init__(
        self,
        bench: Bench,
        profile: Profile,
        choices: Mapping[int, Opened],
        goal: Goal,
        folder: Path,
    ) -> None:
        """Rescales the price table by measured whole-model recipes; kept in the folder."""
        self.bench, self.profile, self.choices, self.goal = bench, profile, choices, goal
        scales = self._scales(folder / SCALES)
        self.layout = Layout(self._surrogate(scales), choices, bench.bank.facts, goal)

    def run(
        self, limits: Limits, seed: int, on_trial: Callable[[Row, int], None] | None = None
    ) -> list[Row]:
        """Runs or resumes the study; returns all its rows. Every start is measured at least."""
        if limits.anew:
            fresh(limits.storage, STUDY)
        return run(
            limits.storage,
            STUDY,
            self.layout.space,
            self.layout.starts,
            self.evaluate,
            objectives=self.goal.objectives,
            trials=max(limits.trials, len(self.layout.starts)),
            seed=seed,
            seconds=limits.seconds,
            resume=limits.resume,
            context=self._binding(),
            on_trial=on_trial,
        )

    def evaluate(self, choice: Choice, rows: Sequence[Row] = ()) -> Outcome:
        """Measures one configuration: true bytes and mean KL on the search text."""
        chosen = self.layout.assignment(choice)
        policies = self.layout.policies(chosen)
        means = self.bench.measure(policies).means()
        weight = weigh(policies, self.bench.bank.facts, self.goal.context, self.goal.batch)
        values = {"memory": float(weight.bytes), "accuracy": means["kl"]}
        predicted = self.layout.surrogate.predict(chosen)[1]
        notes = {"flips": means["flips"], "dnll": means["dnll"]}
        attrs = {**notes, "bits": weight.bits, "predicted": predicted}
        return Outcome(tuple(values[name] for name in self.goal.objectives), attrs)

    def _surrogate(self, scales: Mapping[Side, float]) -> Surrogate:
        facts = self.bench.bank.facts
        return Surrogate.of(self.choices, self.profile, facts, self.goal.context, scales)

    def _scales(self, kept: Path) -> dict[Side, float]:
        if kept.is_file():
            try:
                held = json.loads(kept.read_text())
                if held["binding"] == self._binding():
                    return {side: float(held["scales"][side]) for side in SIDES}
            except (ValueError, KeyError, TypeError):
                hint = f"Delete {kept} and run the command again."
                raise IntegrityError(f"{kept} is damaged.", hint) from None
        scales = self._measured_scales()
        held = {"binding": self._binding(), "scales": scales}
        write_atomic(kept, json.dumps(held).encode())
        return scales

    def _measured_scales(self) -> dict[Side, float]:
        """How much the measured KL of a side exceeds its priced sum, over uniform recipes.

        Errors of one kind compound over layers, so sums of prices are low by a steady factor.
        """
        plain = self._surrogate({})
        return {side: self._scale(side, plain) for side in SIDES}

    def _scale(self, side: Side, plain: Surrogate) -> float:
        factors = []
        for chain in _probes(self.choices, side, plain):
            try:
                measured = self.bench.measure(self._one_sided(side, chain)).means()["kl"]
            except ResourceError:
                continue  # a scale from the other probe, or none, only orders the starts less well
            rungs = [r for place, found in plain.rungs.items() if place[1] == side for r in found]
            priced = sum(rung.price for rung in rungs if rung.chain == chain)
            if measured > 0 and priced > 0:  # a context shorter than a block encodes nothing
                factors.append(measured / priced)
        return math.prod(factors) ** (1 / len(factors)) if factors else 1.0

    def _one_sided(self, side: Side, chain: Chain) -> tuple[Policy, ...]:
        layers = range(len(self.bench.bank.facts.layers))
        found = {i: own.cell(side, chain) for i, own in self.choices.items()}
        return tuple(found.get(i, Policy()) for i in layers)

    def _binding(self) -> str:
        """What a study belongs to: model, texts, space and goal."""
        cells = [[cell.layer, cell.side, cell.setting] for cell in self.profile.cells]
        bound = [
            self.profile.meta.get("fingerprint"),
            self.profile.meta.get("text"),
            sha256_bytes(self.bench.bank.tokens.cpu().numpy().tobytes()),
            cells,
            [f"{price:.9e}" for price in self.profile.prices().values()],
            [str(value) for value in vars(self.goal).values()],
            str(self.bench.model.dtype),
        ]
        return sha256_bytes(canonical_json(bound).encode())


def _probes(choices: Mapping[int, Opened], side: Side, plain: Surrogate) -> list[Chain]:
    """Two settings that every layer opens: the cheapest, and one a third of the way up."""
    common = shared(choices, side)
    ladder = plain.ladders[next(iter(choices)), side]
    chains = [rung.chain for rung in ladder if rung.chain in common]
    return list(dict.fromkeys((chains[0], chains[len(chains) // 3]))) if chains else []
