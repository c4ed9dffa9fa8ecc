"""Where attention to low-rank keys runs: the kernel of `latents` where it can, else its twin."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from kvtune_kernels import latents_reference
from kvtune_kernels.latents_reference import Rotary
from kvtune_kernels.launch import (
    DTYPES,
    Workspace,
    _choice,
    early,
    portable,
    say_once,
    split_count,
    triton,
    unsupported,
    waiting,
)

if triton is not None:
    from kvtune_kernels import latents as kernels
    from kvtune_kernels import paged

__all__ = ["Rotary", "attend_latents", "paired_basis", "unsupported_latents"]

HIGHEST = 512  # rank
HELD = 1 << 15  # numbers of `up` that a program holds, at most


def attend_latents(
    query: Tensor, latents: Tensor, up: Tensor | None, values: Tensor | None,
    rotary: Rotary | None = None, mean: Tensor | None = None, index: Tensor | None = None,
    counts: Tensor | None = None, start: int | Tensor = 0, scale: float | None = None,
    value_scales: Tensor | None = None, paired: bool = False, workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Answers query [B, Hq, D], one token a row, over low-rank keys RoPE(latents @ up + mean).

    Every kv head h reads its own tokens `index` [B, H, S] (int32; of them the first `counts` [B, H]
    or [B]), or all T in order; the token at index i has position start + i, `start` one number or
    int [B]. `latents` [B, T, r] belong to all kv heads, or [B, G, T, r] to groups of them; `up` is
    [H, r, D], or [B, H, r, D] where each row has a basis of its own; `mean` [H, D] or [B, H, D].
    With `paired`, `up` comes from `paired_basis`. `values` [B, G, T, Dv] in 16 bits, or int8 times
    `value_scales` [B, G, T]; None asks for the log-sum-exp alone. `query` is after RoPE, `rotary`
    None where there is none.

    Without `up`, latents are what the query meets: [B, Hq, r] absorbed (q up^T) of models without
    RoPE, or plain keys; and values may be latents as well: then the answer is theirs, [B, Hq, rv].
    `scale` must be given then where r is not head_dim.

    Returns:
        (out [B, Hq, Dv], lse [B, Hq] in fp32 to the base e): tiers meet in the softmax.
        A row without tokens has 0 and -inf.

    Raises:
        ValueError: shapes that do not fit each other.

    Sources: ShadowKV (arXiv:2410.21465), Palu (arXiv:2407.21118), xKV (arXiv:2503.18893).
    """
    _check(query, latents, up, values, index, rotary)
    more = (rotary, mean, index, counts, start, scale, value_scales, paired)
    if not _runs_triton(query, latents, up, values):
        return latents_reference.attend_latents(query, latents, up, values, *more)
    return _launched(workspace or Workspace(), query, latents, up, values, *more)


def _check(
    query: Tensor, latents: Tensor, up: Tensor | None, values: Tensor | None, index: Tensor | None,
    rotary: Rotary | None,
) -> None:  # fmt: skip
    rank, (batch, query_heads, dim) = latents.shape[-1], query.shape
    heads = latents_reference.head_count(latents, up, values, index)
    wanted = dim if up is None else up.shape[-2]
    if rank != wanted:
        raise ValueError(f"latents of rank {rank} meet {wanted} numbers of each query or basis")
    if up is not None and up.shape[-1] != dim:
        raise ValueError(f"a basis to {up.shape[-1]} channels meets queries of {dim}")
    if rotary is not None and rotary.table is None and rotary.frequency is None:
        raise ValueError("a Rotary needs a table or frequencies")
    if rotary is not None and (up is None or rotary.width > dim):
        raise ValueError(
            f"{rotary.width} channels cannot turn of keys that have {dim}, or no basis"
        )
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads are no multiple of {heads} kv heads")
    for name, x in (("latents", latents), ("values", values)):
        groups = x.shape[1] if x is not None and x.dim() == 4 else 1
        if heads % groups:
            raise ValueError(f"{heads} kv heads are no multiple of {groups} groups of {name}")
        if x is not None and (x.shape[0] != batch or x.shape[-2] != latents.shape[-2]):
            raise ValueError(f"{name} {tuple(x.shape)} do not have the {batch} rows and tokens")


def unsupported_latents(
    query: Tensor, latents: Tensor, up: Tensor | None, values: Tensor | None
) -> str | None:
    """Says why the kernel cannot serve low-rank keys, or None when it can."""
    rank, dim = latents.shape[-1], query.shape[-1]
    if reason := unsupported(dim if up is not None else 16, query.dtype, query.device):
        return reason
    if latents.dtype not in DTYPES or (up is not None and up.dtype not in DTYPES):
        return "latents or their basis are not of a 16-bit dtype"
    if rank % 16 or rank > HIGHEST:
        return f"rank {rank} is not a multiple of 16 up to {HIGHEST}"
    if values is not None:
        if values.dtype not in (*DTYPES, torch.int8):
            return f"{str(values.dtype).removeprefix('torch.')} values are of neither 16 nor 8 bits"
        if values.shape[-1] % 16 or values.shape[-1] > 256:
            return f"values of {values.shape[-1]} channels are not a multiple of 16 up to 256"
    return None


def _runs_triton(query: Tensor, latents: Tensor, up: Tensor | None, values: Tensor | None) -> bool:
    choice = _choice.get()
    if choice == "reference" or (choice == "auto" and query.device.type != "cuda"):
        return False
    reason = unsupported_latents(query, latents, up, values)
    if reason is not None:
        say_once(f"kvtune reads low-rank keys in plain torch: {reason}.")
    return reason is None


def _launched(
    workspace: Workspace, query: Tensor, latents: Tensor, up: Tensor | None,
    values: Tensor | None, rotary: Rotary | None, mean: Tensor | None, index: Tensor | None,
    counts: Tensor | None, start: int | Tensor, scale: float | None, value_scales: Tensor | None,
    paired: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = latents_reference.head_count(latents, up, values, index)
    batch, query_heads, dim = query.shape
    latents = _flat(latents if latents.dim() == 4 else latents[:, None])
    given = latents if values is None else values
    held = _flat(given if given.dim() == 4 else given[:, None])
    query, rank, share = _flat(query), latents.shape[-1], query_heads // heads
    width = 0 if values is None else held.shape[-1]
    tokens = latents.shape[2] if index is None else index.shape[2]
    first, rest = pieces(rank)
    wide = triton.next_power_of_2(dim) if up is not None else 32
    keeps = (first + (rest if rank > first else 0)) * wide <= HELD or up is None
    plan = tuned(share)
    room = slots(query.device, plan["num_warps"])
    splits = split_count(batch * heads, -(-tokens // plan["N"]), room)
    out, lse = workspace.partial(batch * query_heads * splits, width or 16, query.device)
    if up is not None and rotary is not None and not paired:
        up = paired_basis(up, rotary)
    up = latents if up is None else up.contiguous()
    mean = mean if mean is None else mean.contiguous()
    index = index if index is None or index.stride(-1) == 1 else index.contiguous()
    scales = None if value_scales is None else value_scales.contiguous()
    turns = rotary if rotary is not None else Rotary(0)
    tabled = turns.table is not None
    launch = functools.partial(
        kernels.attend_split[(heads, splits, batch)],
        query, latents, up, _or(mean, query), held, _or(scales, query), _or(index, lse),
        _or(counts, lse), start if isinstance(start, Tensor) else lse,
        _or(turns.table, lse), _or(turns.frequency, lse), out, lse,
        dim**-0.5 if scale is None else scale, turns.factor,
        *query.stride()[:2], *latents.stride()[:3], *_steps(up, 4), *_steps(mean, 3),
        *held.stride()[:3], *_steps(scales, 3), *_steps(index, 3), *_counts(counts),
        turns.table.stride(0) if tabled else 0,
        heads, share, tokens, splits, heads // latents.shape[1], heads // held.shape[1],
        0 if isinstance(start, Tensor) else start,
        UP=up is not latents, MEANS=mean is not None, INDEXED=index is not None,
        COUNTED=counts is not None, STARTED=isinstance(start, Tensor), SCALED=scales is not None,
        TURNS=rotary is not None, TABLED=tabled, INTERLEAVED=turns.interleaved,
        WIDTH=turns.width, D=dim, D2=wide, R=rank, R1=first if keeps else 64, R2=rest,
        HELD=keeps, DV=width, DV2=triton.next_power_of_2(max(width, 16)),
        EARLY=early(query.device), AHEAD=early(query.device), **plan,
    )  # fmt: skip
    if portable() or not in_pairs(launch(ASM=True)):
        launch(ASM=False)
    # without values there is nothing to join but the log-sum-exp, beside channels that nobody wrote
    size = width or 16
    result = torch.empty(batch, query_heads, size, dtype=query.dtype, device=query.device)
    told = torch.empty(batch, query_heads, dtype=torch.float32, device=query.device)
    many, wide = triton.next_power_of_2(splits), triton.next_power_of_2(size)
    paged.merge[(batch * query_heads,)](
        out, lse, result, told, lse, lse, *result.stride()[:2], 0, batch, heads, share, 1, splits,
        ADVANCE=False, TELL=True, D=size, D2=wide, PARTS=many, FEW=min(many, 8192 // wide),
        num_warps=4, **waiting(query.device),
    )  # fmt: skip
    return result[..., :width], told


def paired_basis(up: Tensor, rotary: Rotary) -> Tensor:
    """A basis [..., r, D] in the order that kernels read, channels that turn together side by side:
    made once, and handed over with `paired`, it saves a copy of the basis at every call."""
    return up[..., rotary.pairs(up.shape[-1]).to(up.device)].contiguous()


def pieces(rank: int) -> tuple[int, int]:
    """The largest power of two up to a rank, and the smallest one, 16 at least, that holds the
    rest of it."""
    first = 1 << rank.bit_length() - 1
    return first, triton.next_power_of_2(max(16, rank - first))


def tuned(share: int) -> dict[str, int]:
    """Tokens and query columns of a tile, its stages and warps: so that two programs fit a
    multiprocessor at rank 160, where one more stage or twice the tokens were slower."""
    return {"N": 64, "C": max(8, triton.next_power_of_2(share)), "STAGES": 2, "num_warps": 4}


@functools.cache
def in_pairs(kernel: object) -> bool:
    """Whether a compiled kernel holds neighbouring channels side by side where inline PTX turns
    them: the sums of a product do, of whichever generation."""
    text = getattr(kernel, "asm", {}).get("ttgir", "")
    turned = re.findall(r"packed_element = 2 .*-> tensor<[^#]*(#\w+)", text)
    sound = all(re.search(rf"{layout} = #ttg.nvidia_mma<", text) for layout in turned)
    if not sound:
        say_once("kvtune turns low-rank keys without inline PTX: this Triton lays out sums anew.")
    return sound


@functools.cache
def slots(device: torch.device, warps: int) -> int:
    """Programs that run on the device at one time: shared memory allows two a multiprocessor."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count * 4 // warps


def _flat(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or one that stands in its place and is not read."""
    return other if x is None else x


def _steps(x: Tensor | None, axes: int) -> tuple[int, int]:
    """Strides of rows and heads, 0 for rows that share what has no axis of rows."""
    if x is None:
        return 0, 0
    return (x.stride(0), x.stride(1)) if x.dim() == axes else (0, x.stride(0))


def _counts(counts: Tensor | None) -> tuple[int, int]:
    if counts is None:
        return 0, 0
    return counts.stride(0), counts.stride(1) if counts.dim() == 2 else 0
