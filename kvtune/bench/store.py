"""Store: a random packed cache on a device, and how far attention to it is from exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kvtune_kernels import (
    Exact,
    Format,
    Map,
    Packed,
    Workspace,
    attend,
    attend_packed,
    plane_table,
    turn,
)
from kvtune_kernels.reference import dense_row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvtune.bench.cases import Case

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Store:
    """A cache in the formats of a case, and one query token for each row."""

    case: Case
    query: Tensor  # [B, Hq, 1, D]
    keys: Packed
    values: Packed
    exact: Exact
    state: Tensor  # int32 [3, B]: tokens seen, and twice the paged ones
    map: Map | None = None  # in place of the four of a folded layer, which are as large

    @classmethod
    def random(cls, case: Case, device: torch.device, room: int = 0) -> Store:
        """Random codes and queries, keys and values of standard deviation 1; never zeros, which
        would cost less power. `room`: pages for as many tokens, at least."""
        shape, window = case.shape, case.window
        paged = case.paged()
        tokens = -(-max(*paged, room) // window.block) * window.block
        size = (shape.batch, shape.kv_heads, tokens, shape.head_dim)
        keys, values = (packed(format, size, device) for format in (case.keys, case.values))
        slots = window.sinks + window.ring
        held = [
            torch.randn(*size[:2], slots, size[3], dtype=DTYPE, device=device) for _ in range(2)
        ]
        state = torch.tensor([shape.lengths(), paged, paged], dtype=torch.int32, device=device)
        query = (shape.batch, shape.heads, 1, shape.head_dim)
        return cls(
            case,
            torch.randn(query, dtype=DTYPE, device=device),
            keys,
            values,
            Exact(held[0], held[1]),
            state,
            random_map(shape.kv_heads, shape.head_dim, device) if case.folded else None,
        )

    def step(self, workspace: Workspace) -> Tensor:
        """What attention costs a decoded token: with the turning of a folded layer."""
        if self.map is None:
            return self.attend(workspace)
        new = (self.exact.keys[:, :, :1], self.map), (self.exact.values[:, :, :1], self.map)
        query, _, _ = turn((self.query, self.map), *new)
        (out,) = turn((replace(self, query=query).attend(workspace), self.map))
        return out

    def attend(self, workspace: Workspace) -> Tensor:
        """Packed attention, its merge included: [B, Hq, 1, D]."""
        return attend_packed(
            self.query,
            self.keys,
            self.values,
            self.exact,
            self.state,
            self.case.window,
            longest=max(self.case.paged()),
            workspace=workspace,
        )

    def dense(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, T, D] of a row, dequantised in fp32."""
        window = self.case.window
        return dense_row(self.keys, self.values, self.exact, self.state, window, row)


def packed(format: Format, size: tuple[int, int, int, int], device: torch.device) -> Packed:
    """Random codes for [B, H, T, D], with scales and zeros that spread them to about one."""
    batch, heads, tokens, dim = size
    planes = random_planes(heads, dim, format.channels).to(device) if format.channels else None
    found = Packed.empty(format, batch, heads, tokens, dim, device, planes)
    found.codes.random_(0, 256)
    steps = 2**format.bits
    unit = (12 / (steps**2 - 1)) ** 0.5  # the reciprocal spread of codes of equal odds
    if format.symmetric:
        found.meta.uniform_(0.75 * unit, 1.25 * unit)
        return found
    scale, zero = found.meta.unflatten(-1, (-1, 2)).unbind(-1)
    scale.uniform_(0.75 * unit, 1.25 * unit)
    if planes is not None:
        # each plane counts four times the one below it; all of a channel spread it to about one
        plane, count = planes >> 16 & 0xFF, planes >> 24
        scale.mul_((4.0 ** (plane - count) * 4)[None, :, None])
        zero.copy_(torch.where(plane == 0, -1.5, 0.0)[None, :, None])
        return found
    zero.copy_(torch.randn_like(zero).mul_(0.1).sub_(scale * ((steps - 1) / 2)))
    return found


def random_planes(heads: int, dim: int, channels: int) -> Tensor:
    """A table [H, C] of up to four planes a channel."""
    rows = [torch.randperm(4 * dim)[:channels] // 4 for _ in range(heads)]
    return plane_table(torch.stack([torch.bincount(row, minlength=dim) for row in rows]))


def random_map(heads: int, dim: int, device: torch.device) -> Map:
    """A rotation of each head, and an offset."""
    basis = torch.linalg.qr(torch.randn(heads, dim, dim))[0]
    return Map(basis.contiguous().to(device), torch.randn(heads, dim).to(device))


def errors(store: Store, out: Tensor) -> tuple[float, float]:
    """Relative errors against fp32 attention on the dequantised cache: of `out`, and of bf16 flash
    on the same cache in bf16. Two rows are looked at, so that memory suffices."""
    ours, flash, exact = [], [], []
    for row in sorted({0, store.case.shape.batch - 1}):
        keys, values = store.dense(row)
        query = store.query[row : row + 1]
        exact.append(attend(query.float(), keys, values).flatten())
        flash.append(_flash(query, keys.to(DTYPE), values.to(DTYPE)).float().flatten())
        ours.append(out[row].float().flatten())
    true = torch.cat(exact)
    return _relative(torch.cat(ours), true), _relative(torch.cat(flash), true)


def _flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    if query.device.type != "cuda":
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())
