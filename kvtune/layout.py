"""Layout: the points that a search starts from, and the space of moves around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvtune.errors import UsageError, suggest
from kvtune.models import Facts
from kvtune.parts import Chain
from kvtune.recipe import Policy
from kvtune.sampling import Choice, Seeded, Space
from kvtune.space import SIDES, Opened, Side
from kvtune.surrogate import Assignment, Surrogate

T = TypeVar("T")
OBJECTIVES = ("memory", "accuracy")
START = "start"
NEGLIGIBLE = 1e-5  # nats: past the first point within it, more bytes buy nothing
STEPS = {"cheaper": -1, "same": 0, "dearer": 1}


@dataclass(frozen=True)
class Goal:
    """What a search is for: objectives, and the context length and batch that bytes are for."""

    objectives: tuple[str, ...] = OBJECTIVES
    context: int = 32768
    batch: int = 1
    budgets: int = 18  # points of the surrogate front
    rivals: int = 12  # uniform recipes that meet it on held-out text; a third is searched too
    clusters: int = 4  # per side

    @classmethod
    def parse(cls, objectives: str, context: int, batch: int) -> Goal:
        """Reads `memory,accuracy`; UsageError for anything else."""
        wanted = tuple(word.strip() for word in objectives.split(","))
        for word in wanted:
            if word not in OBJECTIVES:
                raise UsageError(f"There is no objective {word!r}.", suggest(word, OBJECTIVES))
        if len(set(wanted)) != len(wanted) or len(wanted) < 2:
            hint = "Give memory,accuracy: a front needs both, each once."
            raise UsageError(f"--objective {objectives} makes no front.", hint)
        return cls(wanted, context, batch)


class Layout:
    """The surrogate front and what it is compared with, and how a configuration reads.

    A configuration is one of these starts, with some clusters of layers moved a rung along their
    ladders. So the sampler explores around a front that is already good.
    """

    def __init__(
        self, surrogate: Surrogate, choices: Mapping[int, Opened], known: Facts, goal: Goal
    ) -> None:
        self.surrogate, self.choices, self.known, self.goal = surrogate, choices, known, goal
        self.clusters = surrogate.clusters(goal.clusters)
        self.rivals = self._rivals()
        searched = spread(list(self.rivals), max(2, goal.rivals // 3))
        some = {name: self.rivals[name] for name in searched}
        self.bases = _distinct({**some, **self._protected(some), **self._fronts()})
        moves = {name: tuple(STEPS) for name in self.clusters}
        still = dict.fromkeys(self.clusters, "same")
        self.space = Space({START: tuple(self.bases), **moves})
        self.starts = [Seeded(name, {START: name, **still}) for name in self.bases]

    def assignment(self, choice: Choice) -> Assignment:
        """The settings that a configuration stands for."""
        chosen = self.bases[choice[START]]
        for name, places in self.clusters.items():
            if steps := STEPS[choice[name]]:
                chosen = self.surrogate.moved(chosen, places, steps)
        return chosen

    def policies(self, chosen: Assignment) -> tuple[Policy, ...]:
        """One policy per layer."""
        return tuple(
            self.choices[i].policy(chosen[i, "keys"], chosen[i, "values"])
            if i in self.choices
            else Policy()
            for i in range(len(self.known.layers))
        )

    def _fronts(self) -> dict[str, Assignment]:
        found: dict[str, Assignment] = {}
        for index, budget in enumerate(self.surrogate.budgets(self.goal.budgets)):
            found[f"knapsack {index:02}"] = chosen = self.surrogate.cheapest(budget)
            if self.surrogate.predict(chosen)[1] < NEGLIGIBLE:
                break
        return found

    def _rivals(self) -> dict[str, Assignment]:
        """Uniform recipes on their own predicted front: what a user would try by hand."""
        every = uniforms(self.choices)
        kept: list[str] = []
        best = float("inf")
        predicted = ((*self.surrogate.predict(chosen), name) for name, chosen in every.items())
        for _, kl, name in sorted(predicted):
            if kl < best and best > NEGLIGIBLE:
                kept.append(name)
                best = kl
        return {name: every[name] for name in spread(kept, self.goal.rivals)}

    def _protected(self, some: Mapping[str, Assignment]) -> dict[str, Assignment]:
        """The rule of thumb: a middling uniform recipe, first and last two layers at their best."""
        named = list(some.items())
        layers = sorted(self.choices)
        ends = {*layers[:2], *layers[-2:]}
        found = {}
        for name, uniform in named[len(named) // 3 : len(named) // 3 + 1]:
            ladders = self.surrogate.ladders
            safe = {place: ladders[place][-1].chain for place in uniform if place[0] in ends}
            found[f"ends protected, {name}"] = {**uniform, **safe}
        return found


def uniforms(choices: Mapping[int, Opened]) -> dict[str, Assignment]:
    """All recipes that treat every layer alike: each pair of settings that all layers open."""
    keys, values = (shared(choices, side) for side in SIDES)
    return {f"uniform {k} | {v}": _everywhere(choices, k, v) for k in keys for v in values}


def shared(choices: Mapping[int, Opened], side: Side) -> list[Chain]:
    """The settings that every layer opens, in the first layer's order."""
    layers = list(choices.values())
    rest = [set(own.chains(side)) for own in layers[1:]]
    return [chain for chain in layers[0].chains(side) if all(chain in own for own in rest)]


def spread(items: list[T], most: int) -> list[T]:
    """An even choice of at most `most` items, both ends included."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _everywhere(choices: Mapping[int, Opened], keys: Chain, values: Chain) -> Assignment:
    chains = {"keys": keys, "values": values}
    return {(layer, side): chains[side] for layer in choices for side in SIDES}


def _distinct(bases: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Each assignment once, under its first name."""
    found: dict[str, Assignment] = {}
    for name, chosen in bases.items():
        if chosen not in found.values():
            found[name] = chosen
    return found
