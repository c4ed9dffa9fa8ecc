"""Laws of append: decoding leaves the bytes that encoding the whole at once would have left."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from kvtune_kernels import Exact, Format, Packed, Window, append, cut, encode, implementation
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

GPU = torch.cuda.is_available()
HEADS, STEPS = (4, 700) if GPU else (1, 200)


class Kind(NamedTuple):
    """A layer that decodes: its formats, what it keeps exact, and where its ring begins."""

    keys: Format
    values: Format
    dim: int
    sinks: int
    recent: int
    shift: int = 0

    @property
    def window(self) -> Window:
        return Window(self.sinks, self.recent, max(self.keys.block, self.values.block))


KINDS = {
    "plain": Kind(Format(4, 32, False), Format(4, 64, True), 64, sinks=0, recent=0),
    "sinks": Kind(Format(2, 64, False), Format(2, 32, True), 32, sinks=5, recent=7),
    "blocks-apart": Kind(Format(8, 128, False), Format(3, 32, True), 64, sinks=3, recent=20),
    "tokens-of-keys": Kind(Format(3, 32, True), Format(8, 64, False), 96, sinks=4, recent=0),
    "shifted": Kind(Format(4, 16, True), Format(2, 16, True), 16, sinks=2, recent=16, shift=9),
}
if GPU:
    KINDS |= {
        "real": Kind(Format(4, 128, False), Format(4, 128, True), 128, sinks=4, recent=128),
        "wide": Kind(Format(3, 64, False), Format(3, 64, True), 256, sinks=1, recent=64),
    }
DTYPES = (torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """All that `append` writes to."""

    exact: Exact
    keys: Packed
    values: Packed
    state: Tensor
    after: Tensor

    @classmethod
    def empty(cls, kind: Kind, batch: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """Rows without tokens: what is not written yet is NaN, or 0xFF."""
        window, room = kind.window, -(-STEPS // kind.window.block) * kind.window.block
        held = torch.full(
            (2, batch, HEADS, window.sinks + window.ring, kind.dim), torch.nan, dtype=dtype
        )
        sides = []
        for format in (kind.keys, kind.values):
            packed = Packed.empty(format, batch, HEADS, room, kind.dim, device)
            packed.codes.fill_(255)
            packed.meta.fill_(torch.nan)
            sides.append(packed)
        state = torch.zeros(3, batch, dtype=torch.int32, device=device)
        exact = Exact(*held.to(device).unbind(), kind.shift)
        return cls(exact, sides[0], sides[1], state, state.clone())

    def take(self, key: Tensor, value: Tensor, window: Window) -> None:
        """One token a row; the next state becomes the state, as `attend_packed` makes it."""
        append(key, value, self.exact, self.keys, self.values, self.state, self.after, window)
        self.state.copy_(self.after)

    def bytes(self) -> list[Tensor]:
        """Everything, so that NaN equals NaN."""
        held = (self.exact.keys, self.exact.values, self.keys.codes, self.keys.meta)
        return [x.view(torch.uint8) for x in (*held, self.values.codes, self.values.meta)]


def tokens(kind: Kind, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keys and values [2, B, H, T, D] of all steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, batch, HEADS, STEPS, kind.dim, generator=generator)
    return (x * 3 + 1).to(dtype).to(device)


@pytest.mark.parametrize("layer", KINDS)
def test_a_kernel_appends_as_the_reference_does(layer: str, device: torch.device) -> None:
    """Byte for byte after each step, in rows of different lengths."""
    kind, dtype = KINDS[layer], DTYPES[len(layer) % 2]
    twins = [Rows.empty(kind, 2, dtype, device) for _ in range(2)]
    new = tokens(kind, 2, dtype, device)
    for rows in twins:  # the second row has some tokens already
        rows.state[0, 1] = ahead = kind.sinks + 30
        slots = kind.sinks + (torch.arange(ahead - kind.sinks) - kind.shift) % kind.window.ring
        for held, x in zip(rows.exact[:2], new, strict=True):
            held[1, :, : kind.sinks] = x[1, :, : kind.sinks]
            held[1, :, slots.to(device)] = x[1, :, kind.sinks : ahead]
    for step in range(STEPS - ahead):
        at = torch.tensor([step, step + ahead], device=device)[None, :, None, None, None]
        key, value = new.take_along_dim(at, 3).unbind()
        for rows, choice in zip(twins, ("triton", "reference"), strict=True):
            with implementation(choice):
                rows.take(key, value, kind.window)
        if step % 7 == 0 or step > STEPS - ahead - 10:
            assert torch.equal(twins[0].state, twins[1].state), step
            for one, two in zip(*(rows.bytes() for rows in twins), strict=True):
                assert torch.equal(one, two), step


@pytest.mark.parametrize(
    ("impl", "layer"),
    [
        *itertools.product(["reference"], KINDS),
        *itertools.product(["triton"], KINDS if GPU else ["sinks"]),
    ],
)
def test_a_token_is_stored_once_and_where_its_turn_puts_it(
    impl: str, layer: str, device: torch.device
) -> None:
    """Sinks and window exact, all between them as if it had been encoded in one go."""
    kind, dtype = KINDS[layer], DTYPES[len(layer) % 2]
    window, rows = kind.window, Rows.empty(kind, 1, dtype, device)
    new = tokens(kind, 1, dtype, device)
    with implementation(impl):
        for step in range(STEPS):
            rows.take(*new[:, :, :, step : step + 1], window)
    closed = window.due(STEPS - 1)
    assert rows.state[:, 0].tolist() == [STEPS, closed, closed]
    assert closed >= window.block and window.ring < STEPS
    live = torch.arange(closed, STEPS - kind.sinks, device=device)
    slots = kind.sinks + (live - kind.shift) % window.ring
    for x, held, packed, is_keys in zip(
        new, rows.exact[:2], (rows.keys, rows.values), (True, False), strict=True
    ):
        codes, meta = encode(x[:, :, kind.sinks : kind.sinks + closed], packed.format, is_keys)
        paged = cut(packed, closed)
        assert torch.equal(paged.codes, codes) and torch.equal(paged.meta, meta)
        assert torch.equal(held[:, :, : kind.sinks], x[:, :, : kind.sinks])
        assert torch.equal(held[:, :, slots], x[:, :, kind.sinks + closed :])
        # and nothing lies behind what is due
        assert (packed.codes[:, :, paged.codes.shape[2] :] == 255).all()
        assert packed.meta[:, :, paged.meta.shape[2] :].isnan().all()


def test_new_tokens_may_be_views(device: torch.device) -> None:
    """As a projection hands them over: [B, 1, H, D] turned round, and a last axis with gaps."""
    kind = KINDS["plain"]
    twins = [Rows.empty(kind, 2, torch.bfloat16, device) for _ in range(2)]
    new = tokens(kind, 2, torch.bfloat16, device)
    wide = torch.cat([new, new], -1).transpose(2, 3).contiguous().transpose(2, 3)
    gaps = torch.stack([new, new], -1)[..., 0]
    with implementation("triton"):
        for step in range(3):
            at = slice(step, step + 1)
            twins[0].take(*wide[:, :, :, at, : kind.dim], kind.window)
            twins[1].take(*gaps[:, :, :, at], kind.window)
    for one, two in zip(*(rows.bytes() for rows in twins), strict=True):
        assert torch.equal(one, two)
