"""Laws of kernels/kvtune_kernels/reference.py, the definition of right."""

from __future__ import annotations

import math

import pytest
import torch
from kvtune_kernels import Format, Packed, attend, cut, decode, encode
from kvtune_kernels.reference import (
    dequantize,
    pack,
    pack_pages,
    packed_width,
    quantize,
    store,
    unpack,
    unpack_pages,
)
from torch import Tensor

BITS = (1, 2, 3, 4, 8)
QUANTIZED = (2, 3, 4, 8)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codes(shape: tuple[int, ...], bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "shape", [(8,), (1, 16), (3, 5, 24), (2, 3, 7, 64), (1, 1, 0, 8), (2, 256)]
)
def test_what_is_unpacked_is_what_was_packed(shape: tuple[int, ...], bits: int) -> None:
    plain = codes(shape, bits)
    packed = pack(plain, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert packed.shape[-1] == packed_width(shape[-1], bits)
    assert torch.equal(unpack(packed, bits), plain)


@pytest.mark.parametrize("bits", BITS)
def test_packing_does_not_ask_for_contiguous_memory(bits: int) -> None:
    plain = codes((64, 6, 9), bits).permute(2, 1, 0)
    packed = pack(plain, bits)
    assert torch.equal(packed, pack(plain.contiguous(), bits))
    held = torch.zeros(9, 12, packed.shape[-1] + 3, dtype=torch.uint8)
    view = held[:, ::2, 1:-2]
    view.copy_(packed)
    assert torch.equal(unpack(view, bits), plain)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_has_its_own_bits(bits: int) -> None:
    """All values at all places: no two inputs share their bytes, and no bit is left unused."""
    for place in range(16):
        plain = torch.zeros(2**bits, 16, dtype=torch.uint8)
        plain[:, place] = torch.arange(2**bits)
        assert len(pack(plain, bits).unique(dim=0)) == 2**bits
    full = torch.full((16,), 2**bits - 1, dtype=torch.uint8)
    assert pack(full, bits).tolist() == [255] * (2 * bits)


def steps(scale: Tensor, zero: Tensor, x: Tensor) -> Tensor:
    """Returns half a step, plus what float32 arithmetic and one rounding to x's dtype may add."""
    slack = (x.abs().amax(-2, keepdim=True) + zero.abs() + 256 * scale.abs()).double()
    return scale.double() / 2 + slack * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e-3, -7.0, 113.0, -3e4])
@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 300.0])
def test_no_value_is_ever_clipped(
    spread: float, offset: float, dtype: torch.dtype, bits: int
) -> None:
    x = (random(5, 4, 32, 6, seed=bits) * spread + offset).to(dtype)
    plain, scale, zero = quantize(x, bits)
    assert plain.shape == x.shape and scale.shape == zero.shape == (5, 4, 1, 6)
    assert int(plain.max()) < 2**bits
    back = dequantize(plain, scale, zero, torch.float64)
    assert ((back - x.double()).abs() <= steps(scale, zero, x)).all()


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("offset", [0.0, -3e-5, 17.3, -900.0])
def test_scale_and_zero_are_the_nearest_float16_that_clip_nothing(offset: float, bits: int) -> None:
    x = random(2000, 32, 2).float() + offset
    _, scale, zero = quantize(x, bits)
    low, high = x.aminmax(dim=-2, keepdim=True)
    step = (high - zero) * (1 / (2**bits - 1))
    least = torch.tensor(2.0**-24).half()
    for stored, true in ((zero, low), (-scale, -step)):
        assert (stored.float() <= true).all()
        towards = torch.where(stored < 0, -1, 1).to(torch.int16)
        after = (stored.view(torch.int16) + towards).view(torch.float16)
        after = torch.where(stored == 0, least, after)
        assert (after.float() > true).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 100.0])
def test_a_step_is_no_wider_than_the_values_ask_for(
    spread: float, bits: int, dtype: torch.dtype
) -> None:
    """Storing scale and zero in 16 bits costs a few roundings, at any magnitude."""
    x = (random(64, 32, 8) * spread).to(dtype)
    _, scale, zero = quantize(x, bits)
    eps = torch.finfo(scale.dtype).eps
    low, high = x.double().aminmax(dim=-2, keepdim=True)
    least = torch.finfo(scale.dtype).smallest_normal * eps  # the smallest number that it can store
    needed = (high - low + 2 * eps * low.abs()) / (2**bits - 1)
    assert (scale.double() <= needed * (1 + 2 * eps) + 2 * least).all()
    assert (low - zero.double() <= 2 * eps * low.abs() + 2 * least).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_a_large_constant_offset_costs_8_bits_little(offset: float, dtype: torch.dtype) -> None:
    """Key biases: subtracting round(min / scale) steps instead would leave a handful of codes."""
    x = random(256, 32, 1).to(dtype) + torch.tensor(offset, dtype=dtype)
    plain, scale, zero = quantize(x, 8)
    assert scale.dtype == zero.dtype == torch.float16
    error = (dequantize(plain, scale, zero, torch.float64) - x.double()).abs().max()
    ulp = offset * torch.finfo(torch.float16).eps
    assert error <= (8 + 2 * ulp) / 255


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 3.14159, 1e-6, -1e4, 6e4])
def test_a_constant_group_stays_constant(value: float, dtype: torch.dtype, bits: int) -> None:
    x = torch.full((2, 32, 3), value, dtype=dtype)
    plain, scale, zero = quantize(x, bits)
    back = dequantize(plain, scale, zero, torch.float64)
    assert back.isfinite().all()
    assert back.unique().numel() == 1
    eps = torch.finfo(scale.dtype).eps
    assert ((back - x.double()).abs() <= 2 * eps * abs(value) + 1e-7).all()


@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_and_extremes_stay_finite(dtype: torch.dtype, bits: int) -> None:
    x = random(3, 32, 4).to(dtype)
    x[0, 5, 1], x[1, 7, 2], x[1, 8, 2] = 1e4, -1e4, 1e4
    x[2, :2, 3] = torch.tensor([-65504.0, 65504.0]).to(dtype)
    for group in (x, x[:, :1]):  # one token is a group of one
        plain, scale, zero = quantize(group, bits)
        back = dequantize(plain, scale, zero, torch.float32)
        assert back.isfinite().all() and scale.isfinite().all() and zero.isfinite().all()
        true = group.double().clamp(-65504, 65504)  # the nearest bfloat16 lies beyond float16
        assert ((back - true).abs() <= steps(scale, zero, group)).all()


def test_values_beyond_16_bits_saturate() -> None:
    x = torch.tensor([-1e30, 0.0, 1e30, 3.4e38])[:, None]
    back = dequantize(*quantize(x, 8), torch.float32)
    assert back.isfinite().all()
    assert back[0] < -6e4 < 6e4 < back[2] == back[3]


def test_quantize_leaves_its_input_as_it_is() -> None:
    x = random(4, 32, 8).float()
    before = x.clone()
    quantize(x, 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_a_product_and_a_sum_in_float32(dtype: torch.dtype) -> None:
    plain, scale = codes((5, 32, 4), 4), torch.rand(5, 1, 4).half()
    zero = -torch.rand(5, 1, 4).half()
    back = dequantize(plain, scale, zero, dtype)
    exact = plain.double() * scale.double() + zero.double()
    assert back.dtype == dtype
    torch.testing.assert_close(back, exact.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


PAGED = [
    Format(bits, group, per_token)
    for bits in QUANTIZED
    for group, per_token in ((32, False), (64, False), (128, False), (32, True), (96, True))
]
SIDES = pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])


@SIDES
@pytest.mark.parametrize("bits", QUANTIZED)
@pytest.mark.parametrize("dim", [16, 32, 80, 96, 256])
def test_what_is_unpacked_from_pages_is_what_was_packed(dim: int, bits: int, keys: bool) -> None:
    plain = codes((2, 3, 192, dim), bits)
    pages = pack_pages(plain, bits, keys)
    assert pages.shape == (2, 3, 3, packed_width(64 * dim, bits))
    assert torch.equal(unpack_pages(pages, bits, keys), plain)


@SIDES
@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_page_stands_alone(bits: int, keys: bool) -> None:
    """What changes in one page changes no byte of another."""
    plain = codes((1, 2, 192, 32), bits)
    other = plain.clone()
    other[:, 1, 64:128] ^= 1
    changed = pack_pages(plain, bits, keys) != pack_pages(other, bits, keys)
    assert changed.any(-1).tolist() == [[[False] * 3, [False, True, False]]]


@SIDES
@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_line_of_a_page_is_a_token_of_keys_or_a_channel_of_values(bits: int, keys: bool) -> None:
    """What attention contracts along lies together: one code's change stays within its line."""
    plain = codes((1, 1, 64, 32), bits)
    other = plain.clone()
    other[:, :, 5, 9] ^= 2**bits - 1
    changed = (pack_pages(plain, bits, keys) != pack_pages(other, bits, keys)).flatten()
    lines, line = (64, 5) if keys else (32, 9)
    planes = changed.split([len(changed) * 2 // 3, len(changed) // 3]) if bits == 3 else [changed]
    for plane in planes:
        assert plane.unflatten(0, (lines, -1)).any(-1).nonzero().flatten().tolist() == [line]


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", PAGED, ids=str)
def test_what_is_decoded_is_what_was_encoded_up_to_half_a_step(
    format: Format, dtype: torch.dtype, keys: bool
) -> None:
    x = (random(2, 3, 256, 96, seed=format.bits) * 4 + 3).to(dtype)
    packed = Packed(*encode(x, format, keys), format)
    room = Packed.empty(format, 2, 3, 256, 96, x.device)
    for made, empty in zip(packed[:2], room[:2], strict=True):
        assert (made.shape, made.dtype) == (empty.shape, empty.dtype)
    axis = 3 if format.per_token else 2
    groups, back = (
        y.unflatten(axis, (-1, format.group)).movedim(axis + 1, -1).unsqueeze(-1)
        for y in (x, decode(packed, keys, torch.float64))
    )
    _, scale, zero = quantize(groups, format.bits)
    assert ((back - groups.double()).abs() <= steps(scale, zero, groups)).all()
    assert decode(packed, keys, dtype).dtype == dtype


@SIDES
@pytest.mark.parametrize("format", PAGED, ids=str)
def test_encoding_in_blocks_equals_encoding_in_one_go(format: Format, keys: bool) -> None:
    """And `cut` finds again what `store` has put there, in one row or in all."""
    block = format.block
    x = random(2, 1, 3 * block, 96).float()
    whole, parts = (Packed.empty(format, 2, 1, 3 * block, 96, x.device) for _ in range(2))
    store(whole, *encode(x, format, keys), 0)
    for first in range(0, 3 * block, block):
        for row in (0, 1):
            piece = x[row : row + 1, :, first : first + block]
            store(parts, *encode(piece, format, keys), first, row)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.meta, parts.meta)
    back = decode(whole, keys, torch.float32)
    for row in (None, 1):
        rows = slice(None) if row is None else slice(row, row + 1)
        assert torch.equal(
            decode(cut(whole, 2 * block, row), keys, torch.float32), back[rows, :, : 2 * block]
        )
    assert cut(whole, 0).codes.shape[2] == cut(whole, 0).meta.shape[2] == 0


def eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Softmax attention as the books write it."""
    times = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    logits = torch.einsum("bhmd,bhtd->bhmt", query, keys) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum("bhmt,bhtd->bhmd", weights, values)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [None, 0.31])
@pytest.mark.parametrize("groups", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_attend_equals_softmax_attention(
    dim: int, groups: int, scale: float | None, softcap: float | None
) -> None:
    keys, values = random(2, 2, 13, dim, seed=1), random(2, 2, 13, dim, seed=2)
    for count in (1, 5):
        query = random(2, 2 * groups, count, dim, seed=3)
        causal = torch.ones(count, 13, dtype=torch.bool).tril(13 - count)
        holes = causal & (random(count, 13) > 0)
        holes[:, 0] = True
        for mask in (None, causal, holes):
            expected = eager(query, keys, values, mask, scale or dim**-0.5, softcap)
            found = attend(query, keys, values, mask, scale, softcap)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend_does_not_ask_for_contiguous_memory(softcap: float | None) -> None:
    query, keys, values = (
        random(2, 7, heads, 24, seed=heads).transpose(1, 2) for heads in (6, 3, 2)
    )
    values = values[:, :1].expand(2, 3, 7, 24)
    expected = attend(
        query.contiguous(), keys.contiguous(), values.contiguous(), None, None, softcap
    )
    found = attend(query, keys, values, None, None, softcap)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_returns_the_dtype_it_was_given(dtype: torch.dtype, softcap: float | None) -> None:
    query, keys, values = (random(1, heads, 9, 32, seed=heads) for heads in (4, 2, 1))
    values = values.expand(1, 2, 9, 32)
    exact = attend(query, keys, values, None, None, softcap)
    found = attend(query.to(dtype), keys.to(dtype), values.to(dtype), None, None, softcap)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=0.03, rtol=0.03)


def test_a_query_that_sees_nothing_does_not_spoil_the_others() -> None:
    query, keys, values = (random(1, 2, 3, 16, seed=seed) for seed in range(3))
    mask = torch.tensor([[False] * 3, [True, False, False], [True] * 3])
    for softcap in (None, 2.0):
        found = attend(query, keys, values, mask, None, softcap)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, :, 1], values[:, :, 0], atol=1e-12, rtol=1e-12)
