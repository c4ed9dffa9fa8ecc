"""Laws of quantising and packing: a kernel writes what the reference says, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvtune_kernels import PAGE, Format, Packed, decode, encode, encode_into, implementation
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

GPU = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16)
DIMS = (16, 32, 64, 80, 96, 128, 256)
BATCH, HEADS, BLOCKS = (3, 2, 4) if GPU else (1, 1, 1)
FEW = [Format(4, 32, False), Format(3, 64, True), Format(2, 128, False), Format(8, 32, True)]
SIDES = pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])


def formats(dim: int) -> list[Format]:
    """All formats that a head_dim can be stored in."""
    channel = [Format(bits, group, False) for bits in (2, 3, 4, 8) for group in (32, 64, 128)]
    groups = [group for group in (32, 64) if dim % group == 0 and group < dim]
    token = [Format(bits, group, True) for bits in (2, 3, 4, 8) for group in (*groups, dim)]
    return [format for format in channel + token if format.bits != 3 or dim % 32 == 0]


def cases() -> list[tuple[Format, int, torch.dtype]]:
    """All formats, head_dims and dtypes; the interpreter gets all formats of one head_dim, some of
    the others, and dtypes in turn."""
    found = []
    for dim in DIMS:
        some = formats(dim)
        if not GPU and dim != 64:
            some = some[::5] if dim < 128 else some[1::7]
        for i, format in enumerate(some):
            found += [(format, dim, dtype) for dtype in (DTYPES if GPU else DTYPES[i % 2 :][:1])]
    return found


def named(value: object) -> str:
    """Test ids: bits, group, axis."""
    if isinstance(value, Format):
        return f"{value.bits}b-g{value.group}-{'token' if value.per_token else 'channel'}"
    return str(value).removeprefix("torch.")


def blank(format: Format, batch: int, heads: int, tokens: int, dim: int, device: Any) -> Packed:
    """Room for tokens whose bytes are all 0xFF: so metadata is NaN."""
    packed = Packed.empty(format, batch, heads, tokens, dim, device)
    packed.codes.fill_(255)
    packed.meta.view(torch.uint8).fill_(255)
    return packed


def bytes_of(packed: Packed, tokens: slice, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The bytes of some whole blocks of some rows."""
    size = PAGE if packed.format.per_token else packed.format.group
    pages = slice(tokens.start // PAGE, tokens.stop // PAGE)
    lines = slice(tokens.start // size, tokens.stop // size)
    return packed.codes[rows, :, pages], packed.meta.view(torch.uint8)[rows, :, lines]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tricky(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[B, H, T, D] with all that has gone wrong somewhere: offsets, outliers, constants, zeros."""
    x = random(*shape) * torch.logspace(-3, 1.5, shape[-1]) + 30 * random(1, shape[1], 1, shape[-1])
    x[..., 0], x[..., 1], x[..., 2] = 0.0, -0.0, 3.14159
    x[..., 3] = x[..., 3].sign() * 0.0  # zeros of both signs
    x[..., 4] *= 1e-8  # below the smallest float16
    x[..., 5, :], x[..., 6, :], x[..., 7, :] = 0.0, -0.0, -0.1
    x[..., 9, 7], x[..., 11, 8], x[..., 20, 8] = 1e4, -1e4, 1e4
    x[..., 13, 9], x[..., 14, 10] = 65504.0, -65504.0
    x = x.to(dtype)
    if dtype == torch.bfloat16:
        x[..., 15, 11], x[..., 16, 12], x[..., 17, 12] = 1e30, -1e30, 3e38
    return x


def stored(x: Tensor, format: Format, keys: bool) -> Packed:
    """What the kernel makes of x."""
    batch, heads, tokens, dim = x.shape
    packed = Packed.empty(format, batch, heads, tokens, dim, x.device)
    with implementation("triton"):
        encode_into(packed, x, 0, keys)
    return packed


def same(packed: Packed, codes: Tensor, meta: Tensor) -> bool:
    """Bit for bit, but for the sign of zero."""
    return torch.equal(packed.codes, codes) and torch.equal(packed.meta, meta)


def grouped(x: Tensor, format: Format) -> tuple[Tensor, int]:
    """x with an axis of its own for the members of a group, and which axis that is."""
    axis = 3 if format.per_token else 2
    return x.unflatten(axis, (-1, format.group)), axis + 1


@SIDES
@pytest.mark.parametrize(("format", "dim", "dtype"), cases(), ids=named)
def test_a_kernel_encodes_as_the_reference_does(
    format: Format, dim: int, dtype: torch.dtype, keys: bool, device: torch.device
) -> None:
    """Codes and metadata bit for bit, and each value at most half a step away."""
    x = tricky(BATCH, HEADS, BLOCKS * format.block, dim, dtype=dtype).to(device)
    packed = stored(x, format, keys)
    assert same(packed, *encode(x, format, keys))
    back, true = decode(packed, keys, torch.float64), x.double().clamp(-65504, 65504)
    (true, axis), (back, _) = grouped(true, format), grouped(back, format)
    low, high = true.aminmax(dim=axis, keepdim=True)
    # zero and scale are rounded outwards, to float16; sums are float32
    widened = high - low + low.abs() * 2**-9 + 2**-23
    step = widened * (1 + 2**-9) / (2**format.bits - 1) + 2**-23
    slack = true.abs().amax(axis, keepdim=True) * 1e-6
    assert ((true - back).abs() <= step / 2 + slack).all()


@SIDES
@pytest.mark.parametrize("format", FEW, ids=named)
def test_strides_of_the_input_do_not_matter(
    format: Format, keys: bool, device: torch.device
) -> None:
    """Views as models hand them over: heads behind tokens, a stretch of tokens, some of the heads,
    every second channel."""
    tokens = 128
    whole = tricky(2, 2, tokens + 70, 64).to(device)
    behind = whole.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (
        behind[1:, :, :tokens],
        whole[:, 1:, 37 : 37 + tokens],
        torch.stack([whole, -whole], -1)[1:, 1:, 70:, :, 1],
    ):
        assert not view.is_contiguous()
        packed = stored(view, format, keys)
        assert same(packed, *encode(view.contiguous(), format, keys))


@SIDES
@pytest.mark.parametrize("row", [None, 1])
@pytest.mark.parametrize("format", FEW, ids=named)
def test_only_the_named_tokens_and_rows_are_written(
    format: Format, row: int | None, keys: bool, device: torch.device
) -> None:
    """Room with slack before, behind and beside: heads and pages of larger tensors."""
    block, dim = format.block, 64
    wide = blank(format, 3, 4, 5 * block, dim, device)
    size = PAGE if format.per_token else format.group
    view = Packed(
        wide.codes[:, 1:3, : 4 * block // PAGE], wide.meta[:, 1:3, : 4 * block // size], format
    )
    x = tricky(3 if row is None else 1, 2, block, dim).to(device)
    with implementation("triton"):
        encode_into(view, x, 2 * block, keys, row)
    rows = slice(None) if row is None else slice(row, row + 1)
    codes, meta = encode(x, format, keys)
    written = bytes_of(view, slice(2 * block, 3 * block), rows)
    assert torch.equal(written[0], codes) and torch.equal(written[1].view(torch.float16), meta)
    for part in written:
        part.fill_(255)
    assert (wide.codes == 255).all() and (wide.meta.view(torch.uint8) == 255).all()


@SIDES
@pytest.mark.parametrize("format", FEW, ids=named)
def test_a_block_stands_alone(format: Format, keys: bool, device: torch.device) -> None:
    """Together blocks have the bytes that each has alone: no page is ever written anew."""
    block = format.block
    x = tricky(1, 1, 3 * block, 64).to(device)
    whole = stored(x, format, keys)
    for start in range(0, 3 * block, block):
        alone = stored(x[:, :, start : start + block], format, keys)
        one, other = bytes_of(whole, slice(start, start + block)), bytes_of(alone, slice(0, block))
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_no_tokens_are_no_work(device: torch.device) -> None:
    packed = blank(FEW[0], 1, 1, 64, 64, device)
    with implementation("triton"):
        encode_into(packed, torch.empty(1, 1, 0, 64, dtype=torch.float16, device=device), 0, True)
    assert (packed.codes == 255).all()
