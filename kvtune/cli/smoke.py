"""One Triton kernel that must run where kvtune's own are to run."""

import torch
import triton
import triton.language as tl

SIZE = 64


@triton.jit  # type: ignore[untyped-decorator]
def _double(x, y, size: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, size)
    tl.store(y + at, 2 * tl.load(x + at))


def doubles(device: str = "cuda") -> bool:
    """Whether a kernel compiles, runs and doubles numbers."""
    x = torch.arange(SIZE, device=device, dtype=torch.float32)
    y = torch.empty_like(x)
    _double[(1,)](x, y, SIZE)
    return torch.equal(y, 2 * x)
