"""Kinds of parts that decide which tokens stay: selectors, mergers and allocators of budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor

from kvtune.marks import OneOf, Portion
from kvtune.parts import Part, Table
from kvtune.splits import parted
from kvtune.view import View

SHARES = tuple(n / 20 for n in range(1, 21))
ALL = 1 << 30  # queries: as many as there are
REMEMBERED = 128  # queries that a layer keeps at most, once a prompt is read


class Choice(NamedTuple):
    """Which tokens stay: places [B, H, n], ascending, and what the part wants to know next time."""

    places: Tensor
    memory: Any = None


class Selector(Part):
    """Scores which tokens win.

    `share` of those that leave the window do; with a `budget` instead, a layer holds that many
    tokens in all, sinks and window included, and whenever it holds `every` more, all that are
    not in sinks or window compete again. `alike`: the heads of a layer keep the same tokens.
    """

    kind = "selector"
    share: Annotated[float, Portion(SHARES)] = 0.2
    budget: Annotated[int, Field(ge=0, le=1 << 24)] = 0  # 0: by share
    every: Annotated[int, OneOf((16, 32, 64, 128, 256, 512))] = 64
    alike: Annotated[bool, OneOf((False, True))] = False
    # of {"attention", "queries", "positions", "output", "rope", "replay", "ahead", "kinds"}
    needs: ClassVar[frozenset[str]] = frozenset()
    fits: ClassVar[bool] = False  # it reads tensors that `fit` finds
    by_place: ClassVar[bool] = False  # it has a `choose` of its own, which may keep fewer tokens

    @model_validator(mode="after")
    def _share_or_budget(self) -> Self:
        if self.budget and "share" in self.model_fields_set:
            raise ValueError("give a share, or a budget in tokens, not both")
        return self

    def table(self) -> Table:
        """The TOML table of this part, with what it goes by."""
        whole = super().table()
        del whole["share" if self.budget else "budget"]
        plain = {"every": 64, "alike": False}
        return {name: x for name, x in whole.items() if plain.get(name, ...) != x}

    def __str__(self) -> str:
        told = ", ".join(f"{name}={x}" for name, x in self.table().items() if name != "use")
        return f"{self.name()}({told})"

    @property
    def observed(self) -> int:
        """How many of the last queries it looks at, where it needs "queries"."""
        return 0

    @property
    def in_cache(self) -> bool:
        """Whether keys are turned by their place in the cache, and not by that in the text, which
        may be as long as you like then (StreamingLLM, arXiv:2309.17453)."""
        return False

    @property
    def wants(self) -> frozenset[str]:
        """What the layer must give: what the part `needs`, and what the layer turns keys with."""
        return self.needs | ({"rope"} if self.in_cache else frozenset())

    def blanks(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, Tensor]:
        """The tensors that `fit` finds, without data; they stand in the spot as "METHOD.NAME"."""
        return {}

    def fit(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Finds the tensors of `blanks` from the rows of a layer of a profile, by their names."""
        return {}

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Returns scores [B, H, T] of a view's tokens, in float32 at least, larger = keep."""

    def choose(self, view: View, count: int) -> Choice:
        """Which `count` tokens of a view stay: those of the best scores, of equal ones the later;
        a part that goes by place may keep fewer."""
        score = self.score(view)
        if self.alike:
            score = score.mean(1, keepdim=True).expand_as(score)
        return Choice(parted(score, count)[0])


class Merged(NamedTuple):
    """Keys and values [B, H, T, D] with others folded in, and what the part wants to know next."""

    keys: Tensor
    values: Tensor
    memory: Any = None


class Merger(Part):
    """Folds the tokens that lost into those that won."""

    kind = "merger"
    needs: ClassVar[frozenset[str]] = frozenset()  # of {"rope", "positions"}: with any settings

    @property
    def wants(self) -> frozenset[str]:
        """What of its `needs` it needs with these settings."""
        return self.needs

    @abstractmethod
    def merge(self, won: View, lost: View) -> Merged:
        """Returns the tokens of `won` with those of `lost` folded in; `memory` is in `won`."""


@dataclass(frozen=True, eq=False)
class Stats:
    """What an allocator goes by: of the L layers that share a budget, in their order."""

    layers: int
    heads: int  # kv heads of each
    least: int  # tokens that every layer holds: sinks and window
    most: int  # tokens that there are
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by name, axis 0 is the layers


class Allocator(Part):
    """Shares a budget of tokens out to layers, or to their kv heads: a pure function."""

    kind = "allocator"
    per_head: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()  # tensors of a profile that it goes by

    @abstractmethod
    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L] (or [L, H]), whose mean is exactly `mean`.

        Each is from `stats.least` to `stats.most`, which `mean` is too. Equal inputs get equal
        budgets, but for what does not divide.
        """
