"""Layout: the points that a search starts from, and the space of moves around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import NamedTuple, TypeVar

from kvtune.budgets import Budgets, by_time
from kvtune.chains import Chain
from kvtune.clusters import clusters
from kvtune.errors import UsageError
from kvtune.goal import Goal
from kvtune.joint import common, everywhere
from kvtune.models import Facts
from kvtune.recipe import Policy
from kvtune.sampling import Choice, Seeded, Space
from kvtune.space import SIDES, Choices, Opened, Side, Triple
from kvtune.surrogate import Assignment, Place, Prediction, Setting, Surrogate, by_bytes
from kvtune.views import ALONE as ALONE
from kvtune.views import OWN, saving_by, without_projections
from kvtune.views import View as View

T = TypeVar("T")
START = "start"
NEGLIGIBLE = 1e-5  # nats: past the first point within it, more bytes buy nothing
STEPS = {"cheaper": -1, "same": 0, "dearer": 1}
FINE = 64  # budgets of a surrogate front; a search measures `goal.budgets` of them, then the rest
PAYS = 0.95  # heads differ where that lowers the predicted KL at least to this part of it


class Base(NamedTuple):
    """A point to start from: a window (a key of `opened`) and what each place does under it."""

    window: str
    chosen: Assignment


class Layout:
    """The surrogate front and what it is compared with, and how a configuration reads.

    A configuration is one of these starts, with some clusters of layers moved a rung along their
    ladders. So the sampler explores around a front that is already good.

    Raises:
        UsageError: no recipe keeps to the limits on bytes and time.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        known: Facts,
        goal: Goal,
        fits: Callable[[tuple[Policy, ...]], bool],
        dense_bytes: int,
    ) -> None:
        self.views, self.known, self.goal = views, known, goal
        self._dense_bytes = dense_bytes  # of the 16-bit cache that ratios are to
        self.clusters = clusters(next(iter(views.values())).whole, goal.clusters)
        self.rivals = self._rivals()
        searched = spread(list(self.rivals), max(2, goal.rivals // 3))
        some = {name: self.rivals[name] for name in searched}
        first, more = self._fronts()
        named = _distinct({**self._within(), **some, **self._protected(some), **first})
        fitting = {name: base for name, base in named.items() if fits(self.policies(base))}
        finer = {name: base for name, base in more.items() if fits(self.policies(base))}
        self.bases = _distinct({**fitting, **finer})
        self.essential = len(fitting)  # starts that every search measures
        if not self.bases:
            limits = ", ".join(f"{name} {limit:g}" for name, limit in goal.bounds.table().items())
            raise UsageError(f"No recipe of this template keeps to {limits}.", "Loosen a limit.")
        moves = {name: tuple(STEPS) for name in self.clusters}
        still = dict.fromkeys(self.clusters, "same")
        self.space = Space({START: tuple(self.bases), **moves})
        self.starts = [Seeded(name, {START: name, **still}) for name in self.bases]

    def base(self, choice: Choice) -> Base:
        """The window and settings that a configuration stands for."""
        window, chosen = self.bases[choice[START]]
        surrogate = self._surrogate(window, chosen)
        for name, places in self.clusters.items():
            if steps := STEPS[choice[name]]:
                chosen = surrogate.moved(chosen, places, steps)
        return Base(window, chosen)

    def is_start(self, choice: Choice) -> bool:
        """Whether nothing is moved."""
        return all(choice[name] == "same" for name in self.clusters)

    def policies(self, base: Base) -> tuple[Policy, ...]:
        """One policy per layer."""
        return policies(self.views[base.window].choices, base.chosen, len(self.known.layers))

    def predict(self, base: Base) -> Prediction:
        """What the price table says of it."""
        return self._surrogate(*base).predict(base.chosen)

    def _surrogate(self, window: str, chosen: Assignment) -> Surrogate:
        view = self.views[window]
        if view.by_head is None or next(iter(chosen)) in view.whole.rungs:
            return view.whole
        return view.by_head

    def _fronts(self) -> tuple[dict[str, Base], dict[str, Base]]:
        """The predicted fronts: an even choice of each that is always measured, and the rest."""
        found = {"knapsack": self._front("memory")}
        if self.goal.timed:
            found["fast"] = self._front("latency")
        for name, used in OWN.items() if self.joint else ():
            if own := saving_by(self.views, used):
                found[name] = self._front("memory", own)
        if self.mixed:
            found[ALONE] = self._front("memory", without_projections(self.views))
        if any(view.by_head for view in self.views.values()):
            found["heads"] = self._paying(found["knapsack"])
        first: dict[str, Base] = {}
        more: dict[str, Base] = {}
        for kind, bases in found.items():
            count = self.goal.budgets if kind == "knapsack" else self.goal.budgets // 2
            coarse = spread(list(range(len(bases))), count)
            rest = [i for i in bisected(len(bases)) if i not in coarse]
            first |= {f"{kind} {i:02}": bases[i] for i in coarse}
            more |= {f"{kind} {i:02}": bases[i] for i in rest}
        return first, more

    def _within(self) -> dict[str, Base]:
        """What is predicted to be best within each number of bits that the goal asks for."""
        found = {}
        for bits, budget in zip(self.goal.within, self.budgets, strict=True):
            every = []
            for window, view in self.views.items():
                solver = Budgets(view.whole)
                if budget // self.goal.batch >= solver.range[0]:
                    base = Base(window, solver.best(budget // self.goal.batch))
                    every.append((self.predict(base).kl, base))
            if every:
                found[f"within {bits:g} bits"] = min(every, key=lambda one: one[0])[1]
        return found

    @property
    def budgets(self) -> tuple[int, ...]:
        """The bytes that each number of bits that the goal asks for comes to."""
        return tuple(int(bits / 16 * self._dense_bytes) for bits in self.goal.within)

    @property
    def joint(self) -> bool:
        """Whether tokens are searched beside bits and rank."""
        return next(iter(self.views.values())).whole.joint

    @property
    def mixed(self) -> bool:
        """Whether projections and bits alone are both open, so that each may be compared; where
        tokens are open too, `joint` says more."""
        if self.joint:
            return False
        every = [chain for view in self.views.values() for chain in _chains(view.choices)]
        return any(chain.projects for chain in every) and bool(without_projections(self.views))

    def _front(self, over: str, views: Mapping[str, View] | None = None) -> list[Base]:
        """What nothing is predicted to beat, over all windows, from the smallest on."""
        size, axis = (by_time, "time") if over == "latency" else (by_bytes, "bytes")
        every: list[tuple[float, float, Base]] = []
        for window, view in (self.views if views is None else views).items():
            solver = Budgets(view.whole, size)
            for budget in solver.spread(FINE, high=self._most(over)):
                base = Base(window, solver.best(budget))
                said = view.whole.predict(base.chosen)
                every.append((getattr(said, axis), said.kl, base))
        kept: list[Base] = []
        least = float("inf")
        for _, kl, base in sorted(every, key=lambda item: item[:2]):
            if kl < least and least > NEGLIGIBLE:
                kept.append(base)
                least = kl
        return kept

    def _most(self, over: str) -> float:
        """The largest budget that the limits leave, in the units of the solver."""
        bounds, endless = self.goal.bounds, float("inf")
        if over == "latency":
            return endless if bounds.max_latency is None else 10 * bounds.max_latency
        most = endless if bounds.max_bytes is None else float(bounds.max_bytes)
        ratio = 0.0 if bounds.min_ratio is None else bounds.min_ratio
        return min(most, self._dense_bytes / ratio if ratio else endless) / self.goal.batch

    def _paying(self, whole: list[Base]) -> list[Base]:
        """Heads apart at the bytes of each point of a front, where that is predicted to pay."""
        apart = {w: view.by_head for w, view in self.views.items() if view.by_head}
        solvers = {window: Budgets(by_head) for window, by_head in apart.items()}
        found = []
        for window, chosen in whole:
            if window in apart:
                size, kl, _ = self.views[window].whole.predict(chosen)
                split = solvers[window].best(max(size, solvers[window].range[0]))
                if apart[window].predict(split).kl <= PAYS * kl:
                    found.append(Base(window, split))
        return found

    def _rivals(self) -> dict[str, Base]:
        """Uniform recipes on their own predicted front: what a user would try by hand."""
        every = {
            name: base for window in self.views for name, base in self._uniforms(window).items()
        }
        kept: list[str] = []
        best = float("inf")
        predicted = [(*self.predict(base)[:2], name) for name, base in every.items()]
        for _, kl, name in sorted(predicted):
            if kl < best and best > NEGLIGIBLE:
                kept.append(name)
                best = kl
        return {name: every[name] for name in spread(kept, self.goal.rivals)}

    def _uniforms(self, window: str) -> dict[str, Base]:
        suffix = f" | {window}" if window else ""
        view = self.views[window]
        if view.whole.joint:
            alike = common(view.whole)
            found = {f"uniform {triple}": everywhere(view.whole, triple) for triple in alike}
        else:
            found = uniforms(view.choices)
        return {f"{name}{suffix}": Base(window, chosen) for name, chosen in found.items()}

    def _protected(self, some: Mapping[str, Base]) -> dict[str, Base]:
        """The rule of thumb: a middling uniform recipe, first and last two layers at their best."""
        named = list(some.items())
        found = {}
        for name, (window, uniform) in named[len(named) // 3 : len(named) // 3 + 1]:
            view = self.views[window]
            layers = sorted(view.choices)
            ends = {*layers[:2], *layers[-2:]}
            ladders = view.whole.ladders
            safe = {place: ladders[place][-1].chain for place in uniform if place.layer in ends}
            found[f"ends protected, {name}"] = Base(window, {**uniform, **safe})
        return found


def _chains(choices: Choices) -> list[Chain]:
    return [chain for own in choices.values() for side in SIDES for chain in own.chains(side)]


def _place(item: tuple[Place, Setting]) -> tuple[int, str, int]:
    place = item[0]
    return place.layer, place.side, -1 if place.head is None else place.head


def policies(choices: Choices, chosen: Assignment, layers: int) -> tuple[Policy, ...]:
    """One policy per layer of an assignment."""
    found = {
        layer: _policy(choices[layer], dict(places))
        for layer, places in groupby(
            sorted(chosen.items(), key=_place), key=lambda item: item[0].layer
        )
    }
    return tuple(found.get(i, Policy()) for i in range(layers))


def _policy(own: Opened, places: Mapping[Place, Setting]) -> Policy:
    """A layer's policy; heads of equal settings are grouped."""
    sides: dict[str, dict[int | None, Chain]] = {side: {} for side in SIDES}
    for place, chain in places.items():
        if isinstance(chain, Triple):
            return own.policy_of(chain)
        sides[place.side][place.head] = chain
    if None in sides["keys"]:
        return own.policy(sides["keys"][None], sides["values"][None])
    heads = [(sides["keys"][h], sides["values"][h]) for h in range(len(sides["keys"]))]
    return own.policy_by_head(heads)


def uniforms(choices: Choices) -> dict[str, Assignment]:
    """All recipes that treat every layer alike: each pair of settings that all layers open."""
    keys, values = (shared(choices, side) for side in SIDES)
    return {f"uniform {k} | {v}": _everywhere(choices, k, v) for k in keys for v in values}


def shared(choices: Choices, side: Side) -> list[Chain]:
    """The settings that every layer opens, in the first layer's order."""
    layers = list(choices.values())
    rest = [set(own.chains(side)) for own in layers[1:]]
    return [chain for chain in layers[0].chains(side) if all(chain in own for own in rest)]


def spread(items: list[T], most: int) -> list[T]:
    """An even choice of at most `most` items, both ends included."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def bisected(count: int) -> list[int]:
    """0 to count - 1 so ordered that every beginning is spread evenly: ends, middle, quarters."""
    order, gaps = [0, count - 1], [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(i for i in order if 0 <= i < count))


def _everywhere(choices: Choices, keys: Chain, values: Chain) -> Assignment:
    chains: dict[Side, Chain] = {"keys": keys, "values": values}
    return {Place(layer, side): chains[side] for layer in choices for side in SIDES}


def _distinct(bases: Mapping[str, Base]) -> dict[str, Base]:
    """Each point once, under its first name."""
    found: dict[str, Base] = {}
    for name, base in bases.items():
        if base not in found.values():
            found[name] = base
    return found
