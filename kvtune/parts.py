"""Parts: the mechanisms that recipes are made of, their kinds, and how they are found by name."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from kvtune_kernels import Format
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvtune import discovery
from kvtune.errors import UsageError, suggest
from kvtune.lowrank import Up as Up
from kvtune.marks import OneOf, Setting
from kvtune.marks import legal_values as legal_values
from kvtune.rope import Rope
from kvtune.seen import Fold as Fold
from kvtune.seen import Seen as Seen

SEARCH = "search"  # the value that opens a setting in a template
OPTIONAL = "optional"  # the key that opens in a template whether a part is there at all
ANY = "any"  # the key of a table that stands in a template for one of several lists of parts
Table = dict[str, Setting]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a codec works: what a part may know of its place, since parts hold settings only."""

    layer: int
    side: Literal["keys", "values"]
    positions: Tensor  # [T], the true index of each token
    dtype: torch.dtype
    rope: Rope | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # "svd.basis": of this side


class Code(NamedTuple):
    """What is stored: a body [B, H, T', *], which a chain's next codec may encode, and metadata.

    Axis 2 of all tensors runs along the tokens, in whole blocks, so pages grow by concatenation.
    """

    body: Tensor
    side: tuple[Tensor, ...] = ()


class Part(BaseModel, ABC):
    """One mechanism: a frozen, hashable model of settings. Its name is the name of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    kind: ClassVar[str] = "part"
    needs: ClassVar[frozenset[str]] = frozenset()  # of {"rope", "queries", "attention"}

    @classmethod
    def name(cls) -> str:
        """The method's name: the file's."""
        return cls.__module__.rpartition(".")[2]

    def table(self) -> Table:
        """The TOML table of this part: `parse(part.table()) == part`."""
        return {"use": self.name(), **self.model_dump()}

    def check(self, head_dim: int, side: str) -> None:
        """Raises ValueError when these settings do not fit heads of this size, or this side."""

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.model_dump().items())
        return f"{self.name()}({settings})"


class Codec(Part):
    """Encodes keys or values [B, H, T, D] into fewer bytes and back."""

    kind = "codec"
    fits: ClassVar[bool] = False  # it reads tensors that `fit` finds
    unturns: ClassVar[bool] = False  # it takes keys back before RoPE, and does nothing else
    # those of them that training improves: encode and decode have gradients for them
    trains: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False  # what it stores is a linear map of what it is given: its `fold`

    @property
    def payload_bits(self) -> float:
        """Bits of one stored value, metadata not counted."""
        return 16.0

    @property
    def block(self) -> int:
        """How many tokens must be encoded together."""
        return 1

    def shape(self, heads: int, head_dim: int) -> tuple[int, int]:
        """Heads and channels of the body that it makes of so many; ValueError when it cannot."""
        return heads, head_dim

    @property
    def apart(self) -> bool:
        """Whether each kv head is stored alone, so that heads of a layer may differ."""
        return True

    def least(self, heads: int, head_dim: int) -> int:
        """How many tokens there must be before any is stored: see `learn`."""
        return 0

    @property
    def learns(self) -> bool:
        """Whether it finds tensors in the first tokens of each row."""
        return False

    def learn(self, x: Tensor, site: Site) -> dict[str, Tensor]:
        """Finds tensors [B, ...] of the first tokens x [B, H, T, D] of each row, which are kept
        beside its pages and stand in the site as "METHOD.NAME"; none by default."""
        return {}

    def format(self, head_dim: int) -> Format | None:
        """The format in which GPU kernels read what is stored; None when they cannot."""
        return None

    def planes(self, site: Site) -> Tensor | None:
        """The digits of mixed bits, int32 [H, C], that `format` speaks of; None without any."""
        return None

    def fold(self, site: Site, heads: int, head_dim: int) -> Fold:
        """The map of a linear codec, on the device of its tensors (the CPU without any).

        Raises:
            NotImplementedError: the codec is not `linear`; a chain asks none of those.
        """
        raise NotImplementedError(f"{self.name()} is not linear")

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The tensors that `fit` finds and that encode and decode read, without data; axis 0 is
        the kv heads. They stand in the site as "METHOD.NAME"."""
        return {}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the tensors of `blanks` from what calibration saw."""
        return {}

    def up(self, site: Site) -> Up | None:
        """The way back from what it stores, where that is a linear map of it."""
        return None

    def behind(self, seen: Seen, site: Site) -> Seen:
        """What a codec after this one sees; `site` holds what this one's `fit` found."""
        return seen.behind(self.fold(site, *seen.mean.shape)) if self.linear else seen

    @abstractmethod
    def encode(self, x: Tensor, site: Site) -> Code:
        """Encodes x [B, H, T, D]; T is a multiple of `block`. The input is left as it is."""

    @abstractmethod
    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns [B, H, T, D] in `site.dtype`."""


class Quantizer(Codec):
    """A codec that ends a chain: its body is packed bytes."""

    kind = "quantizer"


class Projection(Codec):
    """A codec that keeps fewer channels, `rank` of them; it stands before a quantizer."""

    kind = "projection"


class Sharer(Part):
    """Stores the same side of neighbouring layers together, in one body [B, H, T, C].

    `block` tokens are folded together, when the last layer of a group has seen them.
    """

    kind = "sharer"
    layers: Annotated[int, OneOf((1, 2, 4, 8))] = 4
    block: Annotated[int, OneOf((64, 128, 256))] = 64

    @abstractmethod
    def shape(self, side: str, layers: int, heads: int, head_dim: int) -> tuple[int, int]:
        """Heads and channels of the body of so many layers; ValueError when it cannot be."""

    @abstractmethod
    def part(self, side: str) -> float:
        """Values of the body per value of the layers of a whole group."""

    def least(self, layers: int, heads: int, head_dim: int) -> int:
        """How many tokens there must be before any is stored: see `learn`."""
        return 0

    def learn(self, layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> dict[str, Tensor]:
        """Finds tensors [B, ...] of the first tokens [B, H, T, D] of each layer, which are kept
        beside the body and stand in every layer's site as "METHOD.NAME"; none by default."""
        return {}

    def up(self, index: int, site: Site) -> Up | None:
        """The way back from the body to the index-th layer, keys before RoPE where it `needs` one;
        None where that is no linear map."""
        return None

    @abstractmethod
    def fold(self, layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> Code:
        """Encodes the same side [B, H, T, D] of several layers at once. What stands beside the
        body grows along axis 2 too, at a pace of its own."""

    @abstractmethod
    def unfold(self, code: Code, index: int, site: Site) -> Tensor:
        """Returns the index-th layer [B, H, T, D], in `site.dtype`."""


class Borrower(Part):
    """Stores nothing of a layer: its queries read the cache of another one."""

    kind = "borrower"
    layer: Annotated[int, Field(ge=0, le=9999)] = 0  # the owner


class Retriever(Part):
    """Finds again what lives in a cheaper place."""

    kind = "retriever"

    @abstractmethod
    def fetch(self, queries: Tensor, digest: Tensor) -> Tensor:
        """Returns units [B, H, U] to fetch of queries [B, Hq, M, D] by digests [B, H, N, *]."""


def names() -> tuple[str, ...]:
    """The names of all methods: the files in `kvtune/methods`."""
    return discovery.names("methods")


def find(name: str) -> type[Part]:
    """Returns the part that the file `methods/<name>.py` defines.

    Raises:
        UsageError: no such file; only those resolve, since recipes come from strangers.
    """
    found: type[Part] = discovery.find("methods", name, Part, "method", "parts")
    return found


def parse(table: Mapping[str, Any]) -> Part:
    """Returns the part of a TOML table such as `{use = "affine", bits = 4}`.

    Raises:
        ValueError: an unknown method or setting, or a value outside its mark, in words.
    """
    settings = dict(table)
    cls = _class_of(settings)
    try:
        return cls(**settings)
    except ValidationError as error:
        raise ValueError(_in_words(cls, error)) from None


def is_open(table: Mapping[str, Any]) -> bool:
    """True when a table leaves a setting, or whether its part is there, to a search."""
    return OPTIONAL in table or ANY in table or SEARCH in table.values()


def choices(table: Mapping[str, Any]) -> Iterator[Part | None]:
    """Yields every part that a table with open settings (`bits = "search"`) stands for.

    After the parts of an optional table (`optional = true`) comes None: the chain without it.

    Raises:
        ValueError: as `parse`, or a setting without a mark is opened.
    """
    settings = dict(table)
    optional = settings.pop(OPTIONAL, None)
    if optional is not None and optional is not True:
        raise ValueError(f"{OPTIONAL} is true or not there, got {optional!r}")
    closed = dict(settings)
    cls = _class_of(settings)
    opened = {name: legal_values(cls, name) for name, value in settings.items() if value == SEARCH}
    for values in itertools.product(*opened.values()):
        yield parse({**closed, **dict(zip(opened, values, strict=True))})
    if optional:
        yield None


def _class_of(settings: dict[str, Any]) -> type[Part]:
    name = settings.pop("use", None)
    if not isinstance(name, str):
        raise ValueError(f'a part needs `use = "METHOD"`, got {name!r}')
    try:
        return find(name)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _in_words(cls: type[Part], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{cls.name()} has no {key!r}. {suggest(key, tuple(cls.model_fields))}"
    return f"{cls.name()}.{key}: {first['msg'].removeprefix('Value error, ')}"
