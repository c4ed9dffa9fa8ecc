"""Search: model + template + Profile -> a measured front, through the runtime that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvtune import joint
from kvtune.budgets import Budgets
from kvtune.cache import Weight, weigh
from kvtune.chains import Chain
from kvtune.commons import shared as shared_by_workers
from kvtune.errors import ResourceError
from kvtune.files import canonical_json, sha256_bytes
from kvtune.goal import Goal
from kvtune.growth import Growth, Reading
from kvtune.halving import promoted
from kvtune.layout import Base, Layout, policies, shared
from kvtune.measure import Bench, Quality
from kvtune.profile import Profile
from kvtune.recipe import Policy
from kvtune.space import AXES, SIDES, Choices, Side, axes
from kvtune.speed import Speed
from kvtune.study import Choice, Outcome, Row, fresh, run
from kvtune.surrogate import Assignment, Place, Surrogate, surrogate
from kvtune.table import Infeasible, Stopped
from kvtune.views import View, saving_by

STUDY, GROWTH = "kvtune", "growth"
PROBES = 5  # sizes of recipes of tokens alone; the last has all of them
FEW = 4  # one sequence in so many is measured before the others


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
        windows: dict[str, Choices],
        goal: Goal,
        limits: Limits,
        speed: Speed | None = None,
    ) -> None:
        """Measures how sums of prices grow into KLs; the study keeps that, and all its workers
        take what the first of them found."""
        self.bench, self.profile, self.goal, self.limits = bench, profile, goal, limits
        self.speed, self.known = speed, bench.bank.facts
        if limits.anew:
            fresh(limits.storage, STUDY)
        plain = {name: self._view(own) for name, own in windows.items()}
        grown = f"{GROWTH} {self._binding()}"
        held = shared_by_workers(limits.storage, STUDY, grown, lambda: self._grown(plain))
        self.growth = Growth.of_table(held)
        views = {name: _rescaled(view, self.growth) for name, view in plain.items()}
        dense = self.weight((Policy(),) * len(self.known.layers)).dense_bytes
        self.layout = Layout(views, self.known, goal, self._fits, dense)

    def run(self, seed: int, on_trial: Callable[[Row, int], None] | None = None) -> list[Row]:
        """Runs or resumes the study; returns all its rows. Every essential start is measured."""
        return run(
            self.limits.storage,
            STUDY,
            self.layout.space,
            self.layout.starts,
            self.evaluate,
            objectives=self.goal.objectives,
            trials=max(self.limits.trials, self.layout.essential),
            seed=seed,
            seconds=self.limits.seconds,
            resume=self.limits.resume or self.limits.anew,
            context=self._binding(),
            on_trial=on_trial,
        )

    def evaluate(self, choice: Choice, rows: Sequence[Row] = ()) -> Outcome:
        """Measures one configuration: bytes and time first, then KL on few sequences, then on all.

        Raises:
            Infeasible: it breaks a limit; without touching the model where the limit is on bytes
                or time.
            Stopped: it is among the worse half on few sequences. Starts are never stopped.
        """
        base = self.layout.base(choice)
        policies = self.layout.policies(base)
        attrs = self._analytic(base, policies)
        excess = self.goal.bounds.excess(attrs)
        if any(over > 0 for over in excess.values()):
            raise Infeasible(attrs, excess)
        quality = self._quality(choice, policies, attrs, rows)
        attrs |= quality.means()
        excess = self.goal.bounds.excess(attrs)
        if any(over > 0 for over in excess.values()):
            raise Infeasible(attrs, excess)
        return Outcome(self._values(attrs, "kl"), attrs, excess)

    def _analytic(self, base: Base, policies: tuple[Policy, ...]) -> dict[str, float]:
        """What is known without the model, and what is predicted."""
        weight = self.weight(policies)
        predicted = self.layout.predict(base).kl
        found = {"bytes": float(weight.bytes), "bits": weight.bits, "ratio": weight.ratio}
        time = {"latency": self.speed.recipe(policies)} if self.speed else {}
        if self.layout.mixed:
            found["projects"] = float(any(policy.projects for policy in policies))
        if self.layout.joint:
            found["projects"] = float(any(policy.projects for policy in policies))
            used = axes(policies)
            found |= {f"uses_{axis}": float(axis in used) for axis in AXES}
        return {**found, **time, "predicted": predicted}

    def _quality(
        self,
        choice: Choice,
        policies: tuple[Policy, ...],
        attrs: dict[str, float],
        rows: Sequence[Row],
    ) -> Quality:
        """Few sequences, then the others where the few are promising; notes the few's KL."""
        total = self.bench.bank.tokens.shape[0]
        few = max(1, total // FEW)
        if self.layout.is_start(choice) or few == total:
            whole = self.bench.measure(policies)
            attrs["few_kl"] = float(whole.kl[:few].double().mean())
            return whole
        first = self.bench.measure(policies, rows=range(few))
        attrs["few_kl"] = first.means()["kl"]
        others = [self._values(row.attrs, "few_kl") for row in rows if "few_kl" in row.attrs]
        if not promoted(self._values(attrs, "few_kl"), others):
            raise Stopped(attrs)
        rest = self.bench.measure(policies, rows=range(few, total))
        return Quality.joined([first, rest])

    def _values(self, attrs: Any, kl: str) -> tuple[float, ...]:
        """One value for each objective, with the KL that is asked for."""
        names = {"memory": "bytes", "accuracy": kl, "latency": "latency"}
        return tuple(float(attrs[names[name]]) for name in self.goal.objectives)

    def weight(self, policies: tuple[Policy, ...]) -> Weight:
        """True bytes at the goal's context and batch."""
        return weigh(policies, self.known, self.goal.context, self.goal.batch)

    def _fits(self, policies: tuple[Policy, ...]) -> bool:
        """Whether policies keep to the limits that need no measuring."""
        weight = self.weight(policies)
        values = {"bytes": float(weight.bytes), "ratio": weight.ratio}
        if self.speed:
            values["latency"] = self.speed.recipe(policies)
        return all(over <= 0 for over in self.goal.bounds.excess(values).values())

    def _view(self, choices: Choices) -> View:
        def made(by_head: bool) -> Surrogate:
            return surrogate(
                choices,
                self.profile,
                self.known,
                self.goal.context,
                speed=self.speed,
                by_head=by_head,
            )

        if any(own.selects for own in choices.values()):
            at = (self.goal.context, self.bench.bank.context)
            whole = joint.surrogate(choices, self.profile, self.known, *at)
            return View(choices, whole, None)
        apart = any(own.per_head for own in choices.values())
        return View(choices, made(False), made(True) if apart else None)

    def _grown(self, views: dict[str, View]) -> dict[str, Any]:
        """How the KL of whole recipes grows with priced sums: one-sided and joint probes.

        Errors of one kind compound over layers, so sums of prices are low by a steady factor, or
        by one that grows.
        """
        view = next(iter(views.values()))
        if view.whole.joint:
            return self._scaled(view)
        chains = {side: _probes(view, side) for side in SIDES}
        probes: list[dict[Side, Chain]] = [{side: c} for side in SIDES for c in chains[side]]
        pairs = zip(chains["keys"], chains["values"], strict=False)
        probes += [{"keys": keys, "values": values} for keys, values in pairs]
        readings = []
        for probe in probes:
            with suppress(ResourceError):  # fewer readings only order the starts less well
                readings.append(self._read(view, probe))
        return Growth.fit(readings).table()

    def _scaled(self, view: View) -> dict[str, Any]:
        """The same where layers have triples: probes of keys and of values alike in all layers,
        and of tokens as a search of them alone would have it."""
        probes = [joint.everywhere(view.whole, own) for own in joint.probes(view.whole)]
        for alone in saving_by({"": view}, frozenset({"tokens"})).values():
            solver = Budgets(alone.whole)
            probes += [solver.best(budget) for budget in solver.spread(PROBES)[:-1]]
        readings, tokens = [], []
        for chosen in probes:
            whole = policies(view.choices, chosen, len(self.known.layers))
            sums = view.whole.sums(chosen)
            with suppress(ResourceError):
                kl = self.bench.measure(whole).means()["kl"]
                readings.append(Reading(sums["keys"], sums["values"], kl))
                if not sums["keys"] and not sums["values"]:
                    tokens.append((sums["tokens"], kl))
        return Growth.scales(readings, tokens).table()

    def _read(self, view: View, chains: dict[Side, Chain]) -> Reading:
        """Measures all layers with the given settings, the other side dense."""
        policies = {i: own.sided(chains) for i, own in view.choices.items()}
        whole = tuple(policies.get(i, Policy()) for i in range(len(self.known.layers)))
        chosen: Assignment = {Place(i, side): c for i in view.choices for side, c in chains.items()}
        sums = view.whole.sums(chosen)
        return Reading(sums["keys"], sums["values"], self.bench.measure(whole).means()["kl"])

    def _binding(self) -> str:
        """What a study belongs to: model, texts, space and goal."""
        cells = [cell.row for cell in self.profile.cells]
        bound = [
            self.profile.meta.get("fingerprint"),
            self.profile.meta.get("text"),
            sha256_bytes(self.bench.bank.tokens.cpu().numpy().tobytes()),
            cells,
            [f"{price:.9e}" for price in self.profile.prices().values()],
            [str(value) for value in vars(self.goal).values()],
            repr(self.speed.table) if self.speed else None,
            str(self.bench.model.dtype),
        ]
        return sha256_bytes(canonical_json(bound).encode())


def _rescaled(view: View, growth: Growth) -> View:
    """The same view with sums that grow as measured."""
    apart = view.by_head.grown(growth) if view.by_head else None
    return View(view.choices, view.whole.grown(growth), apart)


def _probes(view: View, side: Side) -> list[Chain]:
    """Two settings that every layer opens: the cheapest, and one a third of the way up."""
    common = shared(view.choices, side)
    first = Place(next(iter(view.choices)), side)
    ladder = [rung.chain for rung in view.whole.ladders[first]]
    chains = [chain for chain in ladder if isinstance(chain, Chain) and chain in common]
    return list(dict.fromkeys((chains[0], chains[len(chains) // 3]))) if chains else []
