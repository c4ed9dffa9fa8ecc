"""Laws of large caches: where offsets pass 2**31, every row is still read as the row alone."""

from __future__ import annotations

import torch
from kvtune_kernels import Exact, Format, Packed, Window, attend_packed, cut, implementation

KEYS, VALUES = Format(4, 128, False), Format(4, 128, True)


def test_the_last_of_many_rows_is_read_as_the_row_alone(device: torch.device) -> None:
    """On a GPU keys and values take 2.3e9 bytes each, so that 32-bit offsets would wrap."""
    batch, heads, tokens = (34, 8, 1 << 17) if device.type == "cuda" else (3, 2, 256)
    window = Window(sinks=4, recent=16, block=128)
    sides = []
    for format in (KEYS, VALUES):
        packed = Packed.empty(format, batch, heads, tokens, 128, device)
        packed.codes.random_(0, 256)
        packed.meta.uniform_(-0.1, 0.1)
        sides.append(packed)
    held = torch.randn(2, batch, heads, 4 + window.ring, 128, device=device).half()
    seen = tokens + 4 + 20
    state = torch.tensor([[seen], [tokens], [tokens]], dtype=torch.int32, device=device)
    query = torch.randn(batch, 4 * heads, 1, 128, device=device).half()
    last = [cut(side, tokens, batch - 1) for side in sides]
    own = [Packed(side.codes.clone(), side.meta.clone(), side.format) for side in last]
    with implementation("triton"):
        out = attend_packed(
            query, *sides, Exact(*held), state.repeat(1, batch).contiguous(), window
        )
        alone = attend_packed(
            query[-1:],
            *own,
            Exact(*held[:, -1:]),
            state,
            window,
        )
    torch.testing.assert_close(out[-1:], alone, atol=2e-3, rtol=2e-2)
