"""Packing and attention in plain torch: the definition of
right that every kernel is tested against."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvtune_kernels.formats import PAGE, Exact, Format, Packed, Window
from kvtune_kernels.groups import (
    dequantize,
    dequantize_planes,
    quantize,
    quantize_planes,
    quantize_symmetric,
)


def packed_width(width: int, bits: int) -> int:
    """Returns how many bytes hold `width` codes of `bits` bits; `width` is a multiple of 8."""
    return width * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [..., N] (uint8, each below 2**bits) into bytes [..., N * bits / 8].

    The N codes are cut into 8 / bits slices of W bytes' length, and lane j of all slices shares a
    byte's worth of bits, so that unpacking is elementwise. Four neighbouring lanes j, j + 1, j + 2,
    j + 3 share a 32-bit word: even lanes its low half, odd lanes its high half, since a GPU makes
    two numbers at once of the two halves of a word. A half is rotated so that its first codes lie
    on top of a float16's fraction. 3 bits are a plane of the low two bits, then a plane of the high
    bits. Where a plane is no multiple of four bytes (no kernel reads those), lanes stay bytes.
    """
    if bits == 8:
        return codes
    if bits == 3:
        low, high = codes & 3, codes >> 2
        return torch.cat([_pack_lanes(low, 2, 5), _pack_plane(high)], -1)
    return _pack_lanes(codes, bits, 6)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: bytes [..., N * bits / 8] to codes [..., N] (uint8)."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
        return _unpack_lanes(low, 2, 5) | _unpack_plane(high) << 2
    return _unpack_lanes(packed, bits, 6)


def _pack_lanes(codes: Tensor, bits: int, turn: int) -> Tensor:
    """Slices [..., 8 / bits * W] to bytes [..., W], the first code of a half at bit `turn`."""
    wide = codes.shape[-1] * bits // 8 % 4 == 0
    lanes = (2, 2) if wide else (1, 1)
    slots = codes.unflatten(-1, (8 // bits, -1, *lanes)).to(torch.int32)  # [..., slice, word, k, h]
    held = slots[..., 0, :, 0, :].clone()
    for i in range(8 // bits):
        for k in range(lanes[0]):
            if i + k:
                held |= slots[..., i, :, k, :] << bits * (lanes[0] * i + k)
    if not wide:
        return held.flatten(-2).to(torch.uint8)
    held = (held << turn | held >> (16 - turn)).to(torch.int16)
    return held.flatten(-2).contiguous().view(torch.uint8)


def _unpack_lanes(packed: Tensor, bits: int, turn: int) -> Tensor:
    wide = packed.shape[-1] % 4 == 0
    if wide:
        held = _halves(packed)
        held = held >> turn | held << (16 - turn)
    else:
        held = packed.to(torch.int32).unsqueeze(-1)
    count = 2 if wide else 1
    shifts = torch.arange(0, 8 * count, bits, dtype=torch.int32, device=packed.device)
    slots = held.unsqueeze(-1) >> shifts & 2**bits - 1  # [..., word, h, slot]
    slots = slots.unflatten(-1, (-1, count)).to(torch.uint8)  # [..., word, h, slice, k]
    return slots.movedim(-2, -4).transpose(-1, -2).flatten(-4)


def _pack_plane(high: Tensor) -> Tensor:
    """High bits [..., N] to bytes [..., N / 8]: lanes of the upper half of a slice of N / 4 lie one
    bit above those of its lower half, and both two bits above their codes' low bits."""
    if high.shape[-1] % 32:
        return _pack_lanes(high, 1, 6)
    slots = high.unflatten(-1, (4, 2, -1, 2, 2)).to(torch.int32)  # [..., slice, upper, word, k, h]
    held = torch.zeros_like(slots[..., 0, 0, :, 0, :])
    for i, upper, k in itertools.product(range(4), range(2), range(2)):
        held |= slots[..., i, upper, :, k, :] << (4 * i + 2 * k + 6 + upper) % 16
    return held.to(torch.int16).flatten(-2).contiguous().view(torch.uint8)


def _unpack_plane(packed: Tensor) -> Tensor:
    if packed.shape[-1] % 4:
        return _unpack_lanes(packed, 1, 6)
    order = [
        (4 * i + 2 * k + 6 + upper) % 16
        for i, upper, k in itertools.product(range(4), range(2), range(2))
    ]
    shifts = torch.tensor(order, dtype=torch.int32, device=packed.device)
    slots = (_halves(packed).unsqueeze(-1) >> shifts & 1).to(torch.uint8)  # [..., word, h, 16]
    slots = slots.unflatten(-1, (4, 2, 2))  # [..., word, h, slice, upper, k]
    return slots.movedim((-3, -2), (-5, -4)).transpose(-1, -2).flatten(-5)


def _halves(packed: Tensor) -> Tensor:
    """Bytes [..., 4 * words] to their 16-bit halves [..., words, 2], as int32."""
    return (
        packed.contiguous()
        .view(torch.int16)
        .to(torch.int32)
        .bitwise_and(0xFFFF)
        .unflatten(-1, (-1, 2))
    )


def pack_pages(codes: Tensor, bits: int, keys: bool) -> Tensor:
    """Packs codes [B, H, T, D] into pages [B, H, T / PAGE, PAGE * D * bits / 8].

    A page of keys has a line of D channels for each token, a page of values a line of PAGE tokens
    for each channel: an attention kernel contracts along a line. The planes of 3 bits are whole.
    """
    lines = codes.unflatten(2, (-1, PAGE))
    packed = pack(lines if keys else lines.transpose(-1, -2), bits)
    if bits != 3:
        return packed.flatten(-2)
    low, high = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
    return torch.cat([low.flatten(-2), high.flatten(-2)], -1)


def unpack_pages(pages: Tensor, bits: int, keys: bool) -> Tensor:
    """Inverse of `pack_pages`: codes [B, H, T, D] (uint8)."""
    width = pages.shape[-1] // PAGE  # bytes of a token
    lines = PAGE if keys else width * 8 // bits
    if bits == 3:
        low, high = pages.split([pages.shape[-1] // 3 * 2, pages.shape[-1] // 3], -1)
        packed = torch.cat([low.unflatten(-1, (lines, -1)), high.unflatten(-1, (lines, -1))], -1)
    else:
        packed = pages.unflatten(-1, (lines, -1))
    codes = unpack(packed, bits)
    return (codes if keys else codes.transpose(-1, -2)).flatten(2, 3)


def encode(
    x: Tensor, format: Format, keys: bool, planes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encodes x [B, H, T, D], T a multiple of the format's block: codes and metadata of `Packed`.

    Metadata is a line [2 * C] for each group of tokens, or a page [2 * D / group * PAGE] with the
    tokens of one group of channels side by side; symmetric pages hold scales alone, half as many.
    `planes` [H, C] as in `formats.plane_table`, for a format that tells its channels.
    """
    if format.symmetric:
        codes, scale = quantize_symmetric(x.unflatten(-1, (-1, format.group)), format.bits)
        meta = scale.flatten(3).unflatten(2, (-1, PAGE)).transpose(3, 4).flatten(3)
        codes = codes.flatten(3)
    elif format.per_token:
        lines = x.unflatten(-1, (-1, format.group, 1))
        codes, scale, zero = quantize(lines, format.bits)
        pair = torch.stack([scale, zero], -1).flatten(3, 5)  # [B, H, T, D / group, 2]
        meta = pair.unflatten(2, (-1, PAGE)).transpose(3, 4).flatten(3)
        codes = codes.flatten(3)
    else:
        groups = x.unflatten(2, (-1, format.group))
        found = quantize(groups, format.bits) if planes is None else quantize_planes(groups, planes)
        codes, scale, zero = found
        meta = torch.stack([scale, zero], -1).flatten(3)
        codes = codes.flatten(2, 3)
    return pack_pages(codes, format.bits, keys), meta


def decode(packed: Packed, keys: bool, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Inverse of `encode`, up to rounding: [B, H, T, D]. Planes do not tell D: give it as `dim`."""
    format = packed.format
    codes = unpack_pages(packed.codes, format.bits, keys)
    if format.per_token:
        groups = codes.shape[-1] // format.group
        grouped = codes.unflatten(-1, (groups, -1))
        pair = packed.meta.unflatten(-1, (groups, PAGE, -1))  # [B, H, pages, groups, PAGE, *]
        pair = pair.transpose(3, 4).flatten(2, 3)
        if format.symmetric:
            # in fp32: half a float16 scale may be no float16
            scale = pair.float()
            zero = scale * (-(2**format.bits - 1) / 2)
        else:
            scale, zero = (x.unsqueeze(-1) for x in pair.unbind(-1))
        return dequantize(grouped, scale, zero, dtype).flatten(3)
    scale, zero = packed.meta.unflatten(-1, (-1, 2)).unsqueeze(3).unbind(-1)
    grouped = codes.unflatten(2, (-1, format.group))
    if packed.planes is None:
        return dequantize(grouped, scale, zero, dtype).flatten(2, 3)
    return dequantize_planes(grouped, scale, zero, packed.planes, dim).to(dtype).flatten(2, 3)


def append(
    key: Tensor, value: Tensor, exact: Exact, keys: Packed, values: Packed, state: Tensor,
    window: Window,
) -> None:  # fmt: skip
    """Puts one token, key and value [B, H, 1, D], into the ring and closes blocks, in place.

    `state` int32 [3, B]: tokens seen, paged tokens that all queries read, paged tokens.
    """
    ring = exact.keys.shape[2] - window.sinks
    for b, (seen, _, closed) in enumerate(state.T.tolist()):
        place = window.sinks + (seen - window.sinks - exact.shift) % ring
        slot = seen if seen < window.sinks else place
        due = max(closed, window.due(seen))
        for new, held, packed, is_keys in (
            (key, exact.keys, keys, True),
            (value, exact.values, values, False),
        ):
            held[b, :, slot] = new[b, :, 0]
            if due > closed:
                tokens = torch.arange(closed, due, device=held.device)
                x = held[b : b + 1, :, window.sinks + (tokens - exact.shift) % ring]
                made = encode(x, packed.format, is_keys, packed.planes)
                store(packed, *made, closed, row=b)
        state[:, b] = torch.tensor([seen + 1, due, due])


def store(packed: Packed, codes: Tensor, meta: Tensor, first: int, row: int | None = None) -> None:
    """Copies encoded tokens to their place in larger tensors; `first` is their first token."""
    rows = slice(None) if row is None else slice(row, row + 1)
    page = first // PAGE
    line = page if packed.format.per_token else first // packed.format.group
    packed.codes[rows, :, page : page + codes.shape[2]] = codes
    packed.meta[rows, :, line : line + meta.shape[2]] = meta


def attend_packed(
    query: Tensor, keys: Packed, values: Packed, exact: Exact, state: Tensor, window: Window,
    scale: float | None = None, softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Answers query [B, Hq, M, D], the last M tokens of each row, over sinks, pages and ring.

    A query at position p reads token t after the sinks from its page when t < due(p), and exactly
    otherwise; `state` as in `append`. `bias` [B, Hq, M] is added to scaled logits before a softcap.
    Returns [B, Hq, M, D].
    """
    count, device = query.shape[2], query.device
    rows = []
    for b, (seen, start, paged) in enumerate(state.T.tolist()):
        sinks = min(seen, window.sinks)
        tokens = torch.arange(start, seen - sinks, device=device)
        sides = dense_row(keys, values, exact, state, window, b)
        position = torch.arange(seen - count, seen, device=device)[:, None]
        due = (position - window.sinks - window.recent).clamp_min(0) // window.block * window.block
        due = due.clamp_min(start).clamp_max(paged)
        mask = torch.cat(
            [
                torch.arange(sinks, device=device) <= position,
                torch.arange(paged, device=device) < due,
                (tokens >= due) & (tokens + sinks <= position),
            ],
            1,
        )
        asked, (known, read) = query[b : b + 1].float(), sides
        if bias is not None:  # as one more channel, in which every key is one
            scale = query.shape[3] ** -0.5 if scale is None else scale
            asked = torch.cat([asked, bias[b : b + 1, :, :, None] / scale], 3)
            known = torch.cat([known, torch.ones_like(known[..., :1])], 3)
        rows.append(attend(asked, known, read, mask, scale, softcap))
    return torch.cat(rows).to(query.dtype)


def dense_row(
    keys: Packed, values: Packed, exact: Exact, state: Tensor, window: Window, row: int
) -> tuple[Tensor, Tensor]:
    """All keys and values [1, H, T, D] of a row, in fp32: sinks, pages, and exact tokens from the
    first one that a query may not read from its page; `state` as in `append`."""
    seen, start, paged = state[:, row].tolist()
    sinks, ring = min(seen, window.sinks), exact.keys.shape[2] - window.sinks
    tokens = torch.arange(start, seen - sinks, device=state.device)
    slots = window.sinks + (tokens - exact.shift) % ring
    sides = []
    for packed, held, is_keys in ((keys, exact.keys, True), (values, exact.values, False)):
        pages = decode(cut(packed, paged, row), is_keys, torch.float32, held.shape[-1])
        own = held[row : row + 1].float()
        sides.append(torch.cat([own[:, :, :sinks], pages, own[:, :, slots]], 2))
    return sides[0], sides[1]


def cut(packed: Packed, tokens: int, row: int | None = None) -> Packed:
    """The first tokens, a multiple of the block, of all rows or one row: views."""
    rows = slice(None) if row is None else slice(row, row + 1)
    lines = tokens // (PAGE if packed.format.per_token else packed.format.group)
    codes, meta = packed.codes[rows, :, : tokens // PAGE], packed.meta[rows, :, :lines]
    return packed._replace(codes=codes, meta=meta)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention: query [B, Hq, M, D], keys and values
    [B, H, T, D], mask [M, T] (True = seen) -> [B, Hq, M, D].

    Without a mask every query sees every key. The Hq / H query heads that share a kv head are
    folded into the query axis, so keys and values are never repeated. `softcap` bounds the logits
    by softcap * tanh(logits / softcap).
    """
    batch, query_heads, count, dim = query.shape
    groups = query_heads // keys.shape[1]
    folded = query.reshape(batch, keys.shape[1], groups * count, dim)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    if softcap is None:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        out = _attend_softcapped(folded, keys, values, mask, scale or dim**-0.5, softcap)
    return out.reshape(batch, query_heads, count, -1)


def _attend_softcapped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    logits = query @ keys.transpose(-1, -2) * scale
    logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        # not -inf: a query of padding sees nothing, and its NaN would spread to all later layers
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=wide).to(values.dtype) @ values
