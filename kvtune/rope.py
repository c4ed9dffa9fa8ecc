"""Rotary position embedding as an exact, invertible turn, taken from the model's own module."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Positions = Tensor | range
REMEMBERED = 8  # ranges: of tokens that arrive, of what is held, of queries; at two paddings


@dataclass(frozen=True, eq=False)
class Rope:
    """Turns keys [B, H, T, D] by their positions, [T] or one for each [B, H or 1, T], and back.

    The tables of the last ranges of positions are remembered, since all layers of a model ask for
    the same ones, until the last layer says `forget`.

    The angles come from the model's rotary module, so any frequency scaling (Llama-3, YaRN, linear)
    is the model's own. Of a partial rotary width only the first channels turn. Source: RoFormer,
    arXiv:2104.09864.
    """

    module: nn.Module
    layer_type: str | None = None
    interleaved: bool = False
    _ranges: dict[tuple[range, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def nbytes(self) -> int:
        """Bytes of the tables that are remembered."""
        tables = [x for pair in self._ranges.values() for x in pair]
        return sum(x.untyped_storage().nbytes() for x in tables)

    def turn(self, x: Tensor, positions: Positions) -> Tensor:
        """Returns post-RoPE keys from pre-RoPE keys."""
        return self._rotate(x, positions, inverse=False)

    def unturn(self, x: Tensor, positions: Positions) -> Tensor:
        """Returns pre-RoPE keys from post-RoPE keys."""
        return self._rotate(x, positions, inverse=True)

    def forget(self) -> None:
        """Frees what is remembered of ranges."""
        self._ranges.clear()

    def _rotate(self, x: Tensor, positions: Positions, inverse: bool) -> Tensor:
        if x.is_meta:  # only shapes are asked for
            return torch.empty_like(x)
        cos, sin = self._known(positions, x.device)
        width = cos.shape[-1]
        wide = x if x.dtype == torch.float64 else x.float()
        head, tail, cos, sin = wide[..., :width], x[..., width:], cos.to(wide), sin.to(wide)
        if inverse:
            # cos^2 + sin^2 is not 1 where a model scales its embedding (YaRN's attention factor)
            norm = cos.square() + sin.square()
            turned = (head * cos - self._half_turn(head) * sin) / norm
        else:
            turned = head * cos + self._half_turn(head) * sin
        return torch.cat([turned.to(x.dtype), tail], -1)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*, T, W / 2] of each pair of the W channels that turn at positions
        [*, T], in float32."""
        like = torch.empty(1, dtype=torch.float32, device=positions.device)
        extra = () if self.layer_type is None else (self.layer_type,)
        with torch.no_grad():
            cos, sin = self.module(like, positions.reshape(1, -1), *extra)
        half = cos.shape[-1] // 2
        found = (x[0, :, :half].float().unflatten(0, positions.shape) for x in (cos, sin))
        return next(found), next(found)

    def _known(self, positions: Positions, device: torch.device) -> tuple[Tensor, Tensor]:
        if isinstance(positions, Tensor):
            return self._tables(positions.to(device))
        key = positions, device
        if key not in self._ranges:
            places = torch.arange(positions.start, positions.stop, device=device)
            self._ranges[key] = self._tables(places)
            if len(self._ranges) > REMEMBERED:
                del self._ranges[next(iter(self._ranges))]  # the oldest
        return self._ranges[key]

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.tables(positions)
        if self.interleaved:
            return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def _half_turn(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        left, right = x.chunk(2, -1)
        return torch.cat([-right, left], -1)
