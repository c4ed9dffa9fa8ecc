"""Where ragged heads are stored and read: kernels where they can, else plain torch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtune_kernels import ragged_reference
from kvtune_kernels.formats import PAGE, Format, Packed
from kvtune_kernels.launch import (
    COLUMNS,
    DTYPES,
    Workspace,
    _choice,
    early,
    encode_into,
    in_order,
    portable,
    say_once,
    slots,
    stages,
    triton,
    unsupported,
    waiting,
    warps,
    words,
)
from kvtune_kernels.ragged import Plan, Ragged, lines_of, spans
from kvtune_kernels.ragged_reference import decode_ragged

if triton is not None:
    from kvtune_kernels import ragged_kernels as kernels

__all__ = [
    "Ragged",
    "attend_ragged",
    "decode_ragged",
    "encode_ragged",
    "keep_ragged",
    "unsupported_ragged",
]


def encode_ragged(
    ragged: Ragged, x: Tensor, first: int, keys: bool, row: int | None = None,
    head: int | None = None,
) -> None:  # fmt: skip
    """Encodes x [b, h, T, D] to the tokens from `first` on: of one row or all, of one head or all.

    `first` is a multiple of the block. Where T is none, x ends its heads: the last block is filled
    up with their last token, which changes no group's range and is never seen.

    Raises:
        ValueError: tokens that a head has no room for, or that begin within a block.
    """
    count = x.shape[2]
    if count == 0:
        return None
    rows, heads = (slice(None) if i is None else slice(i, i + 1) for i in (row, head))
    lengths = ragged.lengths[rows, heads]
    if first % ragged.block or (lengths < first + count).any():
        raise ValueError(
            f"{count} tokens from {first} on do not fit whole blocks of {ragged.block} within "
            f"{int(lengths.min())} tokens"
        )
    if count % ragged.block and (lengths != first + count).any():
        raise ValueError(f"{count} tokens fill no whole blocks of {ragged.block} and end no head")
    x = _filled(x, ragged.block)
    if row is not None and head is not None and ragged.format is not None:
        return encode_into(ragged.head(row, head), x, first, keys)
    place = ragged.offsets[rows, heads].flatten() + first // PAGE
    pages = spans(place, torch.full_like(place, x.shape[2] // PAGE)).to(x.device)
    if ragged.format is None:
        ragged.codes[:, :, pages] = x.to(ragged.codes.dtype).reshape(1, 1, len(pages), -1)
        return None
    planes = None if ragged.planes is None else ragged.planes[heads]
    made = Packed.empty(ragged.format, *x.shape, x.device, planes)
    encode_into(made, x, 0, keys)
    ragged.codes[:, :, pages] = made.codes.flatten(0, 2)[None, None]
    ragged.meta[:, :, lines_of(pages, ragged.line)] = made.meta.flatten(0, 2)[None, None]
    return None


def _filled(x: Tensor, block: int) -> Tensor:
    """Whole blocks of x [B, H, T, D], the last token again and again behind it."""
    lacking = -x.shape[2] % block
    if lacking == 0:
        return x
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, lacking, -1)], 2)


def keep_ragged(
    x: Tensor, kept: Tensor, format: Format | None, keys: bool, planes: Tensor | None = None
) -> Ragged:
    """Stores the tokens of x [B, H, T, D] that `kept` [B, H, T] marks, in their order.

    One gather and one encoding for all heads, but for planes, where it is one for each.
    """
    batch, heads, _, dim = x.shape
    ragged = Ragged.empty(format, kept.sum(-1), dim, x.device, planes, x.dtype)
    lengths, pages = (n.flatten().to(x.device) for n in (ragged.lengths, ragged.pages))
    rank = torch.arange(int(pages.sum()) * PAGE, device=x.device)
    head = torch.arange(batch * heads, device=x.device).repeat_interleave(pages * PAGE)
    begins = (pages.cumsum(0) - pages) * PAGE
    rank = torch.minimum(rank - begins[head], lengths[head] - 1)  # the last token fills the page
    ends = lengths.cumsum(0)
    flat = x.reshape(-1, dim)
    chosen = kept.reshape(-1).nonzero()[:, 0]
    source = chosen[(ends - lengths)[head] + rank]
    if format is None:
        ragged.codes.copy_(flat[source].view_as(ragged.codes))
    elif planes is None:
        encode_into(ragged.pool, flat[source][None, None], 0, keys)
    else:
        for row in range(batch):
            for h in range(heads):
                own = source[head == row * heads + h]
                encode_into(ragged.head(row, h), flat[own][None, None], 0, keys)
    return ragged


def unsupported_ragged(query: Tensor, keys: Ragged, values: Ragged, exact: Tensor) -> str | None:
    """Says why kernels cannot read such heads, or None when they can."""
    if (keys.format is None) != (values.format is None):
        return "one side is packed and the other is in 16 bits"
    formats = () if keys.format is None else (keys.format, values.format)
    if reason := unsupported(query.shape[-1], query.dtype, query.device, *formats):
        return reason
    kinds = {exact.dtype} if formats else {exact.dtype, keys.codes.dtype, values.codes.dtype}
    if kinds != {query.dtype} or query.dtype not in DTYPES:
        return f"queries in {query.dtype} meet tokens in {', '.join(sorted(map(str, kinds)))}"
    return None


def _runs_triton(query: Tensor, keys: Ragged, values: Ragged, exact: Tensor) -> bool:
    choice = _choice.get()
    if choice == "reference" or (choice == "auto" and query.device.type != "cuda"):
        return False
    reason = unsupported_ragged(query, keys, values, exact)
    if reason is not None:
        say_once(f"kvtune reads ragged heads in plain torch: {reason}.")
    return reason is None


def attend_ragged(
    query: Tensor, keys: Ragged, values: Ragged, exact_keys: Tensor, exact_values: Tensor,
    scale: float | None = None, softcap: float | None = None, workspace: Workspace | None = None,
    known: Tensor | None = None, told: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Answers query [B, Hq, M, D] over the kept tokens of each head and exact ones [B, H, R, D].

    All queries see all kept tokens. Query m of M sees the exact tokens but the last M - 1 - m, as
    the last M of them are the queries' own; in which order those before them lie does not matter.
    `known` int32 [B] counts the exact tokens of each row, where they are fewer than R. A head
    without any tokens answers 0. `told`, float32 [B, Hq, M] in one piece, gets the log-sum-exp of
    each query's logits, by which answers over several stores are merged. The plan of the programs
    is made at the first call for a shape and kept with `keys`: make that call before a CUDA graph
    is captured.

    Returns:
        [B, Hq, M, D] in the dtype of the query.

    Raises:
        ValueError: shapes or lengths that do not fit each other.
    """
    _check(query, keys, values, exact_keys, exact_values)
    if not _runs_triton(query, keys, values, exact_keys):
        return ragged_reference.attend_ragged(
            query, keys, values, exact_keys, exact_values, scale, softcap, known, told
        )
    workspace = workspace or Workspace()
    query = query if query.stride(-1) == 1 else query.contiguous()
    exact_keys, exact_values = (_lines(x) for x in (exact_keys, exact_values))
    batch, query_heads, count, dim = query.shape
    heads = keys.lengths.shape[1]
    share = query_heads // heads
    columns = min(COLUMNS, max(8, triton.next_power_of_2(share * count)))
    blocks = -(-share * count // columns)
    wide = triton.next_power_of_2(dim)
    packed = keys.format is not None
    room = slots(query.device, dim, columns) if packed else slots_16(query.device, wide)
    plan = planned(keys, values, blocks, room)
    items = plan.items.shape[0]
    out, lse = workspace.partial(items * share * count, dim, query.device)
    given = Given(
        query, exact_keys, exact_values, plan.items, plan.first if known is None else known,
        out, lse, dim**-0.5 if scale is None else scale,
        (*query.stride()[:3], *exact_keys.stride()[:2], *exact_values.stride()[:2]),
        (heads, share, count, exact_keys.shape[2]),
    )  # fmt: skip
    own = {
        "N": columns, "MASKED": plan.masked, "COUNTED": known is not None, "D": dim, "D2": wide,
        "CAP": softcap or 0.0, "EARLY": early(query.device),
    }  # fmt: skip
    if packed:
        _launch_packed(given, keys, values, (items, blocks), workspace.lanes(query.device), own)
    else:
        _launch_16(given, keys, values, (items, blocks), own)
    result = torch.empty(batch, count, query_heads, dim, dtype=query.dtype, device=query.device)
    result = result.transpose(1, 2)  # what follows wants [B, M, Hq, D]
    many = triton.next_power_of_2(plan.most)
    kernels.merge_items[(batch * query_heads * count,)](
        out, lse, result, lse if told is None else told, plan.first, *result.stride()[:3],
        heads, share, count, TELL=told is not None, D=dim, D2=wide, PARTS=many,
        FEW=min(many, 8192 // wide), num_warps=4, **waiting(query.device),
    )  # fmt: skip
    return result


class Given(NamedTuple):
    """What both kernels are given in this order, but for the pages."""

    query: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    items: Tensor
    known: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    steps: tuple[int, ...]  # strides
    sizes: tuple[int, ...]


def _launch_packed(
    given: Given, keys: Ragged, values: Ragged, grid: tuple[int, int], lanes: Tensor,
    own: dict[str, Any],
) -> None:  # fmt: skip
    k, v, ek, ev = keys.pool, values.pool, given.exact_keys, given.exact_values
    planes = given.items if keys.planes is None else keys.planes
    launch = functools.partial(
        kernels.attend_packed_items[grid],
        given.query, k.codes, words(k), v.codes, words(v), ek, ev, planes, given.items, given.known,
        lanes, given.out, given.lse, given.scale, *given.steps, *given.sizes,
        K_BITS=k.format.bits, K_GROUP=k.format.group, K_PER_TOKEN=k.format.per_token,
        CHANNELS=k.format.channels, K_SYMMETRIC=k.format.symmetric,
        V_BITS=v.format.bits, V_GROUP=v.format.group, V_PER_TOKEN=v.format.per_token,
        V_SYMMETRIC=v.format.symmetric, STAGES=stages(k.format, v.format),
        num_warps=warps(own["D2"], own["N"]), **own,
    )  # fmt: skip
    if portable() or not in_order(launch(ASM=True)):
        launch(ASM=False)


def _launch_16(
    given: Given, keys: Ragged, values: Ragged, grid: tuple[int, int], own: dict[str, Any]
) -> None:
    kernels.attend_items[grid](
        given.query, keys.codes, values.codes, *given[1:8], *given.steps, *given.sizes,
        STAGES=3 if own["D2"] <= 128 else 2, ASM=not portable(), num_warps=4, **own,
    )  # fmt: skip


def planned(keys: Ragged, values: Ragged, blocks: int, room: int) -> Plan:
    """The plan for so many programs a stretch, made once for the lengths of these keys."""
    plan = keys.plans.get((blocks, room))
    if plan is None or plan.values is not values.offsets:
        plan = keys.plans[blocks, room] = Plan.of(keys, values, blocks, room)
    return plan


@functools.cache
def slots_16(device: torch.device, wide: int) -> int:
    """Programs of 16-bit pages that run on the device at one time: shared memory allows two a
    multiprocessor at head_dim 128."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 256 // wide)


def _lines(x: Tensor) -> Tensor:
    """Exact tokens whose lines lie one behind the other."""
    return x if x.stride(-1) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _check(
    query: Tensor, keys: Ragged, values: Ragged, exact_keys: Tensor, exact_values: Tensor
) -> None:
    batch, query_heads, count, dim = query.shape
    if not torch.equal(keys.lengths, values.lengths):
        raise ValueError("keys and values of ragged heads have other lengths")
    heads = keys.lengths.shape[1]
    if keys.lengths.shape[0] != batch or query_heads % heads:
        raise ValueError(
            f"{query_heads} query heads in {batch} rows do not fit lengths "
            f"{tuple(keys.lengths.shape)} of rows and kv heads"
        )
    room = exact_keys.shape[2]
    if exact_keys.shape != exact_values.shape or exact_keys.shape != (batch, heads, room, dim):
        raise ValueError(
            f"exact tokens {tuple(exact_keys.shape)} and {tuple(exact_values.shape)} are not "
            f"[{batch}, {heads}, R, {dim}]"
        )
    if count > max(1, room):
        raise ValueError(f"{count} queries see one another, but {room} tokens are exact")
