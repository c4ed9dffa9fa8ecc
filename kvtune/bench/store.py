"""Store: a random packed cache on a device, and how far attention to it is from exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvtune_kernels import Exact, Format, Packed, Workspace, attend, attend_packed
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
        )

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
    found = Packed.empty(format, batch, heads, tokens, dim, device)
    found.codes.random_(0, 256)
    scale, zero = found.meta.unflatten(-1, (-1, 2)).unbind(-1)
    steps = 2**format.bits
    unit = (12 / (steps**2 - 1)) ** 0.5  # the reciprocal spread of codes of equal odds
    scale.uniform_(0.75 * unit, 1.25 * unit)
    zero.copy_(torch.randn_like(zero).mul_(0.1).sub_(scale * ((steps - 1) / 2)))
    return found


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
