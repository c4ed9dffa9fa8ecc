"""Laws of planes of mixed bits and of symmetric codes: what they decode to; kernels agree."""

from __future__ import annotations

import pytest
import torch
from kvtune_kernels import (
    Exact,
    Format,
    Packed,
    Window,
    append,
    attend_packed,
    cut,
    decode,
    encode,
    encode_into,
    implementation,
    plane_table,
    reference,
)
from kvtune_kernels.groups import dequantize, quantize, quantize_symmetric
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

GPU = torch.cuda.is_available()
BATCH, HEADS, TOKENS = (2, 4, 1024) if GPU else (1, 2, 256)


def counts(heads: int, dim: int, channels: int, seed: int = 0) -> Tensor:
    """Random planes of each channel [H, D], up to four, `channels` of a head."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(dim).repeat_interleave(4)
    rows = []
    for _ in range(heads):
        chosen = slots[torch.randperm(4 * dim, generator=generator)[:channels]]
        rows.append(torch.bincount(chosen, minlength=dim))
    return torch.stack(rows)


def drawn(dim: int, seed: int = 0, heads: int = HEADS, tokens: int = TOKENS) -> Tensor:
    """[B, H, T, D] in bfloat16 with outliers, constants and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, heads, tokens, dim, generator=generator) * 3 + 0.5
    x[..., 5], x[..., 6, :], x[..., 7, :], x[..., 9, 3] = 0.0, 0.0, -2.5, 1e4
    return x.bfloat16()


def planes_of(dim: int, channels: int, group: int = 128) -> tuple[Format, Tensor]:
    return Format(2, group, False, channels), plane_table(counts(HEADS, dim, channels))


def symmetric(bits: int, group: int) -> Format:
    return Format(bits, group, True, symmetric=True)


def stored(x: Tensor, format: Format, keys: bool, planes: Tensor | None = None) -> Packed:
    """What a kernel makes of x [B, H, T, D]; room that it leaves is 0xFF."""
    found = Packed.empty(format, *x.shape, x.device, planes)
    found.codes.fill_(255)
    found.meta.view(torch.uint8).fill_(255)
    with implementation("triton"):
        encode_into(found, x, 0, keys)
    return found


def near(one: Tensor, two: Tensor) -> bool:
    """Float16 numbers, at most one step apart."""
    return int((one.view(torch.int16).int() - two.view(torch.int16).int()).abs().max()) <= 1


def test_a_table_of_planes_lists_each_channel_as_often_as_it_has_planes() -> None:
    many = counts(3, 16, 32)
    table = plane_table(many).long()
    source, plane, count = table & 0xFFFF, table >> 16 & 0xFF, table >> 24
    for h in range(3):
        assert torch.equal(source[h].bincount(minlength=16), many[h])
        assert torch.equal(count[h], many[h][source[h]])
        for channel in range(16):
            assert plane[h][source[h] == channel].tolist() == list(range(many[h, channel]))


@pytest.mark.parametrize("wrong", [[[1, 2], [1, 1]], [[5, 0], [4, 1]]], ids=str)
def test_heads_of_unlike_sums_and_too_many_planes_are_refused(wrong: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="as many planes, at most 4 a channel"):
        plane_table(torch.tensor(wrong))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("dim", "channels"), [(64, 64), (80, 96), (128, 160)])
def test_planes_are_codes_of_twice_as_many_bits(dim: int, channels: int, group: int) -> None:
    """And a channel without any is zero."""
    format, planes = planes_of(dim, channels, group)
    x, many = drawn(dim).float(), counts(HEADS, dim, channels)
    packed = Packed(*encode(x, format, True, planes), format, planes)
    back = decode(packed, True, torch.float32, dim)
    assert back.shape == x.shape
    for h in range(HEADS):
        for count in range(5):
            own = many[h] == count
            true = torch.zeros_like(x[:, h][..., own])
            if count:
                groups = x[:, h][..., own].unflatten(1, (-1, group))
                true = dequantize(*quantize(groups, 2 * count), torch.float32).flatten(1, 2)
            torch.testing.assert_close(back[:, h][..., own], true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_codes_keep_no_bias(bits: int) -> None:
    """What is decoded lies along x as x does, up to the rounding of a float16 scale."""
    x = drawn(128).float().clamp(-100, 100)
    codes, scale = quantize_symmetric(x, bits)
    back = (codes.float() - (2**bits - 1) / 2) * scale.float()
    power = (x * x).sum(-1)
    assert (((back * x).sum(-1) - power).abs() <= power * 2**-10).all()
    assert (back[x.abs().amax(-1) == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e4, 65504.0, 3e38])
def test_symmetric_codes_are_finite_whatever_they_are_given(bits: int, size: float) -> None:
    x = torch.tensor([[size] * 64, [size, -size] * 32, [size, *[0.0] * 63]])
    codes, scale = quantize_symmetric(x, bits)
    assert scale.isfinite().all() and int(codes.max()) < 2**bits


SIZES = [(64, 64), (64, 80), (96, 144), (128, 128), (128, 16), (80, 240), (64, 256)]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("dim", "channels"), SIZES)
def test_a_kernel_encodes_planes_as_the_reference_does(
    dim: int, channels: int, group: int, device: torch.device
) -> None:
    """Bit for bit, of tokens that lie in memory as a model's do."""
    format, planes = planes_of(dim, channels, group)
    x, planes = drawn(dim).to(device), planes.to(device)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    found, (codes, meta) = stored(turned, format, True, planes), encode(x, format, True, planes)
    assert torch.equal(found.codes, codes) and torch.equal(found.meta, meta)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("dim", "group", "keys"),
    [
        *((dim, dim, False) for dim in (64, 96, 128)),
        *((96, 32, False), (128, 64, False), (64, 64, True), (128, 32, True)),
    ],
)
def test_a_kernel_encodes_symmetric_codes_as_the_reference_does(
    dim: int, group: int, keys: bool, bits: int, device: torch.device
) -> None:
    """Codes bit for bit, scales up to one step: sums may round otherwise."""
    x, format = drawn(dim).to(device), symmetric(bits, group)
    found, (codes, scales) = stored(x, format, keys), encode(x, format, keys)
    assert torch.equal(found.codes, codes) and near(found.meta, scales)


def cache(
    dim: int, channels: int, values: Format, device: torch.device, count: int = 1
) -> tuple[Packed, Packed, Exact, Tensor, Window]:
    """One layer's tokens, as `attend_packed` takes them; one row is shorter than the others."""
    format, planes = planes_of(dim, channels)
    planes, window = planes.to(device), Window(3, 20, 128)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, BATCH, HEADS, TOKENS, dim, generator=generator).bfloat16().to(device)
    keys, packed = stored(x[0], format, True, planes), stored(x[1], values, False)
    ring = window.sinks + window.ring + 16
    shape = (2, BATCH, HEADS, ring, dim)
    exact = Exact(*torch.randn(shape, generator=generator).bfloat16().to(device).unbind())
    seen = [TOKENS - 128 * b + 51 for b in range(BATCH)]
    due = [window.due(n - count) for n in seen]
    state = torch.tensor([seen, due, due], dtype=torch.int32, device=device)
    return keys, packed, exact, state, window


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("dim", "channels", "share", "values"),
    [
        (64, 64, 1, symmetric(2, 64)),
        (64, 80, 3, symmetric(3, 64)),
        (96, 144, 4, symmetric(2, 96)),
        (128, 128, 4, symmetric(4, 128)),
        (128, 160, 8, symmetric(2, 64)),
        (128, 192, 7, Format(2, 128, True)),
        (80, 32, 2, symmetric(2, 80)),
        (64, 256, 2, symmetric(3, 32)),
    ],
    ids=str,
)
def test_a_kernel_reads_planes_and_symmetric_codes_as_the_reference_does(
    dim: int, channels: int, share: int, values: Format, count: int, device: torch.device
) -> None:
    found = cache(dim, channels, values, device, count)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(BATCH, count, HEADS * share, dim, generator=generator)
    query = query.bfloat16().to(device).transpose(1, 2)
    with implementation("triton"):
        out = attend_packed(query, *found)
    true = reference.attend_packed(query.float(), *found)
    assert float((out.float() - true).norm() / true.norm()) < 0.01


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_decoding_leaves_what_encoding_at_once_would_have_left(
    impl: str, device: torch.device
) -> None:
    dim, window, steps = 64, Window(2, 7, 128), 145
    format, planes = planes_of(dim, 80)
    values = symmetric(2, dim)
    tokens = torch.stack([drawn(dim, seed, tokens=steps) for seed in (1, 2)]).to(device)
    keys = Packed.empty(format, BATCH, HEADS, 256, dim, device, planes.to(device))
    packed = Packed.empty(values, BATCH, HEADS, 256, dim, device)
    slots = torch.zeros(2, BATCH, HEADS, 2 + window.ring, dim, dtype=tokens.dtype, device=device)
    state = torch.zeros(3, BATCH, dtype=torch.int32, device=device)
    after = state.clone()
    with implementation(impl):
        for step in range(steps):
            new = tokens[:, :, :, step : step + 1]
            append(*new, Exact(*slots), keys, packed, state, after, window)
            state.copy_(after)
    for side, x, is_keys in ((keys, tokens[0], True), (packed, tokens[1], False)):
        paged = cut(side, 128)
        codes, meta = encode(x[:, :, 2:130], side.format, is_keys, side.planes)
        assert torch.equal(paged.codes, codes) and near(paged.meta, meta)


def test_a_bias_is_a_constant_of_a_querys_logits(device: torch.device) -> None:
    """Softmax alone does not see it, a softcap does; kernel and reference agree on both."""
    found = cache(64, 64, symmetric(2, 64), device)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(BATCH, HEADS * 2, 1, 64, generator=generator).bfloat16().to(device)
    bias = torch.randn(BATCH, HEADS * 2, 1, generator=generator).to(device) * 3
    answers = []
    for more in (None, bias):
        true = reference.attend_packed(query.float(), *found, softcap=2.0, bias=more)
        with implementation("triton"):
            out = attend_packed(query, *found, softcap=2.0, bias=more)
        assert float((out.float() - true).norm() / true.norm()) < 0.01
        answers.append(true)
    assert float((answers[0] - answers[1]).norm() / answers[0].norm()) > 0.05
    plain = reference.attend_packed(query.float(), *found)
    torch.testing.assert_close(
        reference.attend_packed(query.float(), *found, bias=bias), plain, atol=1e-4, rtol=1e-4
    )
