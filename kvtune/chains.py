"""Chains: codecs one after the other, as one side of a layer is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvtune_kernels import Format
from torch import Tensor

from kvtune.lowrank import Latents
from kvtune.parts import Code, Codec, Fold, Projection, Quantizer, Site, Table
from kvtune.seen import joined


class Encoded(NamedTuple):
    """What a chain stores: the last body and each codec's metadata."""

    body: Tensor
    sides: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Chain:
    """Codecs, left to right; decoding runs right to left. An empty chain keeps what it is given."""

    codecs: tuple[Codec, ...] = ()

    @property
    def block(self) -> int:
        """The tokens that all codecs must see together."""
        return math.lcm(*(codec.block for codec in self.codecs))

    @property
    def payload_bits(self) -> float:
        """Code bits per cached value, metadata and windows not counted."""
        return 16 * math.prod(codec.payload_bits / 16 for codec in self.codecs)

    @property
    def apart(self) -> bool:
        """Whether each kv head is stored alone."""
        return all(codec.apart for codec in self.codecs)

    @property
    def projects(self) -> bool:
        """Whether fewer channels are kept, or a basis of them is."""
        return any(isinstance(codec, Projection) for codec in self.codecs)

    @property
    def needs(self) -> frozenset[str]:
        """What the codecs need of their site."""
        return frozenset[str]().union(*(codec.needs for codec in self.codecs))

    def format(self, head_dim: int) -> Format | None:
        """As that of the last codec, where all before it are linear, so that kernels fold them."""
        if not self.codecs or not all(codec.linear for codec in self.codecs[:-1]):
            return None
        return self.codecs[-1].format(head_dim)

    def fold(self, site: Site, heads: int, head_dim: int) -> Fold | None:
        """The linear codecs before the last one as one map; None without any."""
        found = None
        for codec in self.codecs[:-1]:
            own = codec.fold(site, heads, head_dim)
            found = own if found is None else joined(found, own)
        return found

    def planes(self, site: Site) -> Tensor | None:
        """As those of the last codec."""
        return self.codecs[-1].planes(site) if self.codecs else None

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The fitted tensors of all codecs without data, named "METHOD.NAME"."""
        return {
            f"{codec.name()}.{name}": x
            for codec, shape in self.shapes(heads, head_dim)
            for name, x in codec.blanks(*shape).items()
        }

    def shapes(self, heads: int, head_dim: int) -> Iterator[tuple[Codec, tuple[int, int]]]:
        """Each codec with the heads and channels of what it is given; ValueError if one cannot."""
        shape = heads, head_dim
        for codec in self.codecs:
            yield codec, shape
            shape = codec.shape(*shape)

    def least(self, heads: int, head_dim: int) -> int:
        """How many tokens there must be before any is stored."""
        found = (codec.least(*shape) for codec, shape in self.shapes(heads, head_dim))
        return max(found, default=0)

    def encode(self, x: Tensor, site: Site) -> Encoded:
        """Encodes x [B, H, T, D]; T is a multiple of `block`."""
        return self._encode(x, site, None)

    def begin(self, x: Tensor, site: Site) -> tuple[Encoded, dict[str, Tensor]]:
        """The same of the first tokens, and what codecs learn of them, named "METHOD.NAME"."""
        learned: dict[str, Tensor] = {}
        return self._encode(x, site, learned), learned

    def _encode(self, x: Tensor, site: Site, learned: dict[str, Tensor] | None) -> Encoded:
        sides, dtype = [], x.dtype
        for codec in self.codecs:
            if learned is not None and codec.learns:
                learned |= {f"{codec.name()}.{name}": y for name, y in codec.learn(x, site).items()}
                site = replace(site, tensors={**site.tensors, **learned})
            x, side = codec.encode(x, site)
            sides.append(side)
        return Encoded(x.to(dtype) if x.is_floating_point() else x, tuple(sides))

    def latents(self, body: Tensor, site: Site) -> Latents | None:
        """What is stored as latents, for kernels that read these as they lie; None where it is
        quantised, or no linear map leads back. An empty chain stores the heads themselves."""
        unturned = bool(self.codecs) and self.codecs[0].unturns
        rest = self.codecs[unturned:]
        rope = site.rope if unturned else None
        if not self.codecs:
            return Latents(body)
        if len(rest) != 1 or (back := rest[0].up(site)) is None:
            return None
        return Latents(body, back, rope)

    def decode(self, code: Encoded, site: Site) -> Tensor:
        """Returns [B, H, T, D]."""
        x = code.body
        for codec, side in zip(reversed(self.codecs), reversed(code.sides), strict=True):
            x = codec.decode(Code(x, side), site)
        return x

    def check(self, heads: int, head_dim: int, side: str) -> None:
        """Raises ValueError when a codec does not fit, or stands where it cannot."""
        shape = heads, head_dim
        for index, codec in enumerate(self.codecs):
            codec.check(shape[1], side)
            shape = codec.shape(*shape)
            if isinstance(codec, Quantizer) and index < len(self.codecs) - 1:
                after = self.codecs[index + 1].name()
                raise ValueError(
                    f"{codec.name()} packs bytes, so {after} cannot follow it: "
                    f"put {codec.name()} last"
                )

    def tables(self) -> list[Table]:
        """The TOML tables of the codecs."""
        return [codec.table() for codec in self.codecs]

    def __str__(self) -> str:
        return " > ".join(map(str, self.codecs)) or "16-bit"
