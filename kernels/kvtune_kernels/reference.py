"""Packing and attention in plain torch: the definition of
right that every kernel is tested against."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def packed_width(width: int, bits: int) -> int:
    """Returns how many bytes hold `width` codes of `bits` bits; `width` is a multiple of 8."""
    return width * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [..., N] (uint8, each below 2**bits) into bytes [..., N * bits / 8].

    Split order: with two codes a byte, byte j holds codes j and j + N/2; with four, j, j + N/4 and
    so on. Unpacking is then elementwise and lands in contiguous runs, which suits both torch and a
    GPU tile. Three bits are a plane of the low two bits followed by a plane of the high bit, so no
    code crosses a byte.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << (index * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: bytes [..., N * bits / 8] to codes [..., N] (uint8)."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
        return unpack(low, 2) | unpack(high, 1) << 2
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], -1)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each group x [..., G, N] over its axis -2:
    codes [..., G, N], scale and zero [..., 1, N].

    x is about codes * scale + zero. The minimum is subtracted first and all arithmetic is fp32:
    with the usual round(min / scale) zero point, channels with a large constant offset lose bits
    (Qwen2.5's key biases). Scale and zero are stored in 16 bits; zero is rounded down and scale up,
    so that no value is ever clipped.
    """
    store = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    limit, eps = torch.finfo(store).max, torch.finfo(store).eps
    least = torch.finfo(store).smallest_normal * eps  # the step between the smallest numbers
    wide = (x if x.dtype == torch.float64 else x.float()).clamp(-limit, limit)
    low, high = wide.aminmax(dim=-2, keepdim=True)
    zero = low.to(store)
    zero = torch.where(zero.to(wide.dtype) > low, (low - low.abs() * eps - least).to(store), zero)
    step = (high - zero) / (2**bits - 1)
    scale = step.to(store)
    scale = torch.where(scale.to(wide.dtype) < step, (step + step * eps + least).to(store), scale)
    scale = torch.where(
        scale == 0, torch.ones_like(scale), scale
    )  # a constant group: all codes are 0
    codes = ((wide - zero) / scale).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes * scale + zero, computed in fp32; the shapes broadcast."""
    return torch.addcmul(zero.float(), codes.float(), scale.float()).to(dtype)


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
