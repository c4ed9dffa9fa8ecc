"""Publish: proved points become recipes, the chosen one a folder to share, the run its summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune import runs
from kvtune.bank import Bank, Sizes
from kvtune.cache import Weight, weigh
from kvtune.calibrate import find_ropes
from kvtune.errors import ResourceError
from kvtune.files import write_atomic
from kvtune.fit import Fitter, copy, fitted, ship
from kvtune.front import (
    Candidate,
    Point,
    best_uniform,
    held_out,
    worth_measuring,
    worth_proving,
)
from kvtune.goal import Goal
from kvtune.layout import Layout
from kvtune.measure import Bench
from kvtune.models import Facts, facts, fingerprint, label
from kvtune.prove import Proof, by_generation, environment
from kvtune.recipe import RECIPE_FILE, ModelBinding, Policy
from kvtune.space import to_recipe
from kvtune.speed import Speed
from kvtune.study import Row
from kvtune.texts import Document
from kvtune.texts import digest as text_digest

Say = Callable[[str, int, int], None]
Texts = dict[str, list[Document]]


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides model, texts and template."""

    sizes: Sizes = field(default_factory=Sizes)
    goal: Goal = field(default_factory=Goal)
    seed: int = 0
    proof_steps: int = 32
    points: int = 9  # how many recipes of the front are proved
    max_kl: float = 0.02  # the chosen recipe is the smallest one within it
    latency_table: Path | None = None  # of another device than the one at hand


class Publisher:
    """Proves a study's front on held-out text and writes what a run folder shows of it."""

    def __init__(
        self,
        model: Any,
        texts: Texts,
        folder: Path,
        name: str,
        settings: Settings,
        speed: Speed | None,
        say: Say,
    ) -> None:
        self.model, self.texts, self.folder, self.name = model, texts, folder, name
        self.settings, self.speed, self.say = settings, speed, say
        self.known: Facts = facts(model.config)

    def prove(
        self, rows: list[Row], layout: Layout, bank: Bank, fitter: Fitter
    ) -> tuple[list[Point], list[dict[str, Any]]]:
        """Measures the study's front on text that neither calibration nor search saw, and writes
        the recipes that no other measured one, uniform ones included, beats there.

        Returns the proved points, and all that was measured, as plain tables.
        """
        most = self.settings.points
        bench = Bench(self.model, bank, find_ropes(self.model), fitter.layer)
        self.fitter = fitter
        chosen = worth_measuring(rows, layout, 2 * most)
        measured: list[Candidate] = []
        for done, (origin, base) in enumerate(chosen, 1):
            with suppress(ResourceError):  # what does not fit into memory is no candidate
                measured.append(held_out(bench, layout, origin, base, self.speed))
            self.say("held-out text", done, len(chosen))
        runs.clear_front(self.folder)
        points: list[Point] = []
        kept = [one for one in measured if self._keeps(one)]
        proved = worth_proving(kept, most, layout.budgets)
        if bench.compiles:
            self.say("compiling kernels", 0, 1)
            bench.warm(candidate.policies for candidate in proved)
            self.say("compiling kernels", 1, 1)
        for candidate in proved:
            points.append(self._proved(bench, len(points), candidate, measured))
            self.say("proof by generation", len(points), len(proved))
        return points, [one.table(self._weight(one)) for one in measured]

    def _proved(
        self, bench: Bench, index: int, candidate: Candidate, measured: list[Candidate]
    ) -> Point:
        goal, bank = self.settings.goal, bench.bank
        cache = bench.cache(candidate.policies)
        quality = by_generation(self.model, cache, bank, self.settings.proof_steps)
        weight = self._weight(candidate)
        proof = Proof.of(quality, weight, bank.context, goal.context, goal.batch)
        rival = best_uniform(measured, candidate.bytes)
        return self._written(index, candidate, rival, proof)

    def _keeps(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to all limits, on held-out text as well."""
        time = {} if candidate.latency is None else {"latency": candidate.latency}
        ratio = self._weight(candidate).ratio
        values = {"bytes": float(candidate.bytes), "ratio": ratio, "kl": candidate.kl, **time}
        return all(over <= 0 for over in self.settings.goal.bounds.excess(values).values())

    def _weight(self, candidate: Candidate) -> Weight:
        goal = self.settings.goal
        return weigh(candidate.policies, self.known, goal.context, goal.batch)

    def finish(
        self, points: list[Point], command: str, bound: str, found: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the chosen recipe as a folder to share, and the summary; returns the summary."""
        within = [i for i, point in enumerate(points) if point.proof.kl <= self.settings.max_kl]
        chosen = min(within, key=lambda i: points[i].proof.bytes) if within else 0
        tables = [point.table() for point in points]
        target = self.folder / runs.CHOSEN
        write_atomic(
            target / "README.md",
            runs.card(f"{label(self.name)}-kv", label(self.name), tables, chosen, command).encode(),
        )
        copy(self.folder / points[chosen].file, target / RECIPE_FILE)
        summary = {
            "points": tables,
            "chosen": chosen,
            "model": label(self.name),
            "command": command,
            "dense": self._dense(),
            **found,
            **environment(self.model.device),
        }
        runs.write_summary(self.folder, bound, summary)
        return summary

    def _dense(self) -> dict[str, Any]:
        """The 16-bit cache that all is compared with."""
        goal, policies = self.settings.goal, (Policy(),) * len(self.known.layers)
        weight = weigh(policies, self.known, goal.context, goal.batch)
        latency = self.speed.recipe(policies) if self.speed else None
        return {"bytes": weight.dense_bytes, "bits": 16.0, "latency": latency}

    def _written(
        self, index: int, candidate: Candidate, rival: float | None, proof: Proof
    ) -> Point:
        name, file = f"{proof.bits:.2f} bits", f"{runs.FRONT}/{index:02}.toml"
        point = Point(file, name, candidate.origin, candidate.kl, rival, candidate.latency, proof)
        evidence = {
            **proof.table(),
            "held_out_kl": float(f"{candidate.kl:.6g}"),
            "texts": {role: text_digest(documents) for role, documents in self.texts.items()},
            "date": time.strftime("%Y-%m-%d"),
            **environment(self.model.device),
        }
        recipe = to_recipe(
            dict(enumerate(candidate.policies)),
            len(self.known.layers),
            name=f"{label(self.name).rpartition('/')[2].lower()}-{proof.bits:.2f}",
            description=f"{proof.ratio:.2f} times smaller than 16 bits at {proof.bytes_context} "
            f"tokens; KL {proof.kl:.4g} nats on held-out text.",
            model=self._model_binding(),
            measured=evidence,
        )
        ship(recipe, fitted(candidate.policies, self.fitter), self.folder / file)
        return point

    def _model_binding(self) -> ModelBinding:
        first = self.known.layers[self.known.compressible()[0]]
        return ModelBinding(
            name=label(self.name),
            fingerprint=fingerprint(self.model),
            architecture=self.known.architecture,
            layers=len(self.known.layers),
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
        )
