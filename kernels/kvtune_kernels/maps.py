"""Linear maps of heads: where they run, and what they are in plain torch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvtune_kernels.launch import portable, runs_triton, triton, waiting

if triton is not None:
    from kvtune_kernels import turning


class Map(NamedTuple):
    """y = x @ matrix + offset, of each kv head; query heads take the map of the one they share."""

    matrix: Tensor  # [H, D, D], float16 or float32
    offset: Tensor  # [H, D], float16 or float32

    def plain(self, x: Tensor) -> Tensor:
        """y of x [B, Hx, n, D], Hx a multiple of H, in plain torch."""
        wide = x.unflatten(1, (self.matrix.shape[0], -1)).float()
        out = wide @ self.matrix[:, None].float() + self.offset[:, None, None].float()
        return out.flatten(1, 2).to(x.dtype)


def turn(*jobs: tuple[Tensor, Map | None]) -> tuple[Tensor, ...]:
    """Maps up to three tensors [B, Hx, n, D] of one n in one launch; None leaves one as it is.

    What comes back lies in memory as [B, n, Hx, D] does, which is what models make.
    """
    found = [x for x, _ in jobs]
    mapped = [(i, x, map) for i, (x, map) in enumerate(jobs) if map is not None]
    if not mapped or found[0].shape[2] == 0:
        return tuple(found)
    first = found[0]
    if not runs_triton(first.shape[-1], first.dtype, first.device):
        for i, x, map in mapped:
            found[i] = map.plain(x)
        return tuple(found)
    arguments, most, heads = [], 0, 1
    count, dim = first.shape[2:]
    for i, x, map in mapped:
        x = x if x.stride(-1) == 1 else x.contiguous()
        heads = map.matrix.shape[0]
        share = x.shape[1] // heads
        y = x.new_empty(x.shape[0], count, x.shape[1], dim).transpose(1, 2)
        rows = x.shape[0] * share * count
        most = max(most, rows)
        tensors = (x, y, map.matrix, map.offset)
        arguments.append((*tensors, *x.stride()[:3], *y.stride()[:3], rows, share))
        found[i] = y
    rows = [own[-2] for own in arguments]
    nothing = (*arguments[0][:-2], 0, 1)
    arguments += [nothing] * (3 - len(arguments))
    size = 64 if most >= 1024 else 16
    wide = triton.next_power_of_2(dim)
    columns = max(16, min(32, 4096 // wide))
    grid = (sum(-(-own // size) for own in rows), triton.cdiv(dim, columns), heads)
    turning.turn[grid](
        *(part for own in arguments for part in own), count, D=dim, D2=wide, ROWS=size,
        COLUMNS=columns, ASM=not portable(), num_warps=4, **waiting(first.device),
    )  # fmt: skip
    return tuple(found)
