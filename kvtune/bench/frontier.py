"""Frontier: recipes on held-out text, beside the best uniform KIVI recipe at no fewer bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kvtune.bank import Bank
from kvtune.bench.compositions import choices, fits, spelled
from kvtune.cache import resolved, weigh
from kvtune.calibrate import Say, find_ropes, quiet
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.measure import Bench
from kvtune.models import Facts
from kvtune.policy import Policy
from kvtune.saving import check_saves

WINDOW = 128  # tokens: what a recipe may keep exact and still be compared by its codes
KEYS = "affine bits=? group=? axis=channel"
VALUES = "affine bits=? group=? axis=token"
BAND, FEWEST = 1.15, 3  # rivals have up to so many times the recipe's bytes; at least so many
SCREENED, FINALISTS = 4, 3  # one sequence in four picks out which rivals are measured on all
Policies = tuple[Policy, ...]


@dataclass(frozen=True)
class Measured:
    """Policies on held-out text: means over all positions, and their true size."""

    policies: Policies
    kl: float  # nats
    flips: float
    bits: float
    bytes: int

    def table(self) -> dict[str, float]:
        """The numbers alone."""
        return {"kl": self.kl, "flips": self.flips, "bits": self.bits, "bytes": self.bytes}


@dataclass(frozen=True)
class Point:
    """A recipe, and the uniform recipe that it is compared with."""

    name: str
    ours: Measured
    kivi: Measured
    rival: str  # its settings
    rivals: int  # how many were measured
    sinks: int
    recent: int

    @property
    def ratio(self) -> float:
        """KIVI's KL in parts of ours: above 1 the recipe is better."""
        return self.kivi.kl / max(self.ours.kl, 1e-12)

    @property
    def is_short(self) -> bool:
        """Whether the exact window is one of at most 128 tokens."""
        return self.recent <= WINDOW


@dataclass(frozen=True)
class Rival:
    """A uniform KIVI recipe: settings in words, a policy for each layer, and bytes."""

    words: str
    policies: Policies
    bytes: int


class Frontier:
    """A model's bank on held-out text, on which recipes meet their rivals."""

    def __init__(self, model: Any, bank: Bank, context: int, say: Say = quiet) -> None:
        self.model, self.bank, self.context, self._say = model, bank, context, say
        self._bench = Bench(model, bank)  # of rivals, which are many and share their sides
        self._known: dict[tuple[Policies, range], Measured] = {}
        self._all = range(bank.tokens.shape[0])

    def point(self, name: str, path: Path, force: bool = False) -> Point:
        """Measures a recipe (a file or a folder) and its rivals.

        Raises:
            IntegrityError: a recipe of another model (unless forced), or tensors that were changed.
            UsageError: settings that do not fit the model, or save nothing at its context.
        """
        policies, tensors = resolved(path, self.model, force)
        check_saves(policies, self.bank.facts, min(self.bank.context, self.context))
        self._say(f"{name}: recipe", 0, 1)
        own = Bench(self.model, self.bank, find_ropes(self.model), partial(_own, tensors))
        ours = self._measured(own, policies, self._all)
        self._say(f"{name}: recipe", 1, 1)
        found = within(rivals(policies, self.bank.facts, self.context), ours.bytes)
        best, kivi = self._best(name, found)
        full = [policies[i] for i in self.bank.facts.compressible()]
        sinks, recent = (max(getattr(own, side) for own in full) for side in ("sinks", "recent"))
        return Point(name, ours, kivi, best.words, len(found), sinks, recent)

    def _best(self, name: str, found: Sequence[Rival]) -> tuple[Rival, Measured]:
        """The rival of the least KL: a part of the text picks finalists, the whole decides."""
        some = self._all[: -(-len(self._all) // SCREENED)]
        held: dict[Rival, Measured] = {}
        for done, rival in enumerate(found, 1):
            held[rival] = self._rival(rival, some)
            self._say(f"{name}: rivals", done, len(found))
        last = sorted(found, key=lambda rival: held[rival].kl)[:FINALISTS]
        for done, rival in enumerate(last, 1):
            held[rival] = self._rival(rival, self._all)
            self._say(f"{name}: finalists", done, len(last))
        best = min(last, key=lambda rival: held[rival].kl)
        return best, held[best]

    def _rival(self, rival: Rival, rows: range) -> Measured:
        """A rival on some sequences, once for all recipes."""
        if (rival.policies, rows) not in self._known:
            self._known[rival.policies, rows] = self._measured(self._bench, rival.policies, rows)
        return self._known[rival.policies, rows]

    def _measured(self, bench: Bench, policies: Policies, rows: range) -> Measured:
        means = bench.measure(policies, memo=bench is self._bench, rows=rows).means()
        weight = weigh(policies, self.bank.facts, self.context)
        return Measured(policies, means["kl"], means["flips"], weight.bits, weight.bytes)


def _own(tensors: Mapping[str, Tensor], layer: int, policy: Policy) -> dict[str, Tensor]:
    """The tensors of one layer of an artifact."""
    return {name: x for name, x in tensors.items() if name.startswith(f"layer.{layer}.")}


def rivals(policies: Policies, known: Facts, context: int) -> list[Rival]:
    """All uniform KIVI recipes with a recipe's own window in each layer, fewest bytes first.

    Keys per channel and values per token (KIVI, arXiv:2402.02750), any bits and group of each. A
    layer that the recipe leaves in 16 bits has no window of its own: there it is the longest.

    Raises:
        UsageError: heads that no such code fits.
    """
    full = known.compressible()
    windows = [(policies[i].sinks, policies[i].recent) for i in full]
    longest = (max(sinks for sinks, _ in windows), max(recent for _, recent in windows))
    keys, values = (
        [chain for chain in choices(words) if fits(chain, side, known)]
        for side, words in (("keys", KEYS), ("values", VALUES))
    )
    if not keys or not values:
        raise UsageError("No KIVI recipe fits this model's heads.", "Heads are multiples of 8.")
    found = []
    for pair in itertools.product(keys, values):
        made = tuple(
            _policy(own, pair, longest) if i in full else Policy() for i, own in enumerate(policies)
        )
        words = " | ".join(map(spelled, pair))
        found.append(Rival(words, made, weigh(made, known, context).bytes))
    return sorted(found, key=lambda rival: rival.bytes)


def _policy(own: Policy, pair: tuple[Chain, Chain], longest: tuple[int, int]) -> Policy:
    sinks, recent = longest if own.is_dense else (own.sinks, own.recent)
    return Policy(sinks=sinks, recent=recent, keys=pair[0], values=pair[1])


def within(found: Sequence[Rival], least: int) -> list[Rival]:
    """The rivals, given in ascending bytes, that have no fewer bytes than a recipe and not many
    more: those of the band above it, and never fewer than three where there are as many.

    Raises:
        UsageError: a recipe of more bytes than any rival.
    """
    enough = [rival for rival in found if rival.bytes >= least]
    if not enough:
        what = f"The recipe takes {least:,} bytes, more than any uniform KIVI recipe"
        raise UsageError(f"{what} ({found[-1].bytes:,} at most).", "Give one of fewer bits.")
    near = [rival for rival in enough if rival.bytes <= BAND * least]
    return near if len(near) >= FEWEST else enough[:FEWEST]
