"""Laws of turning: a launch maps keys, values and queries as plain torch does."""

from __future__ import annotations

import pytest
import torch
from kvtune_kernels import Map, implementation, turn
from torch import Tensor

pytest.importorskip("triton")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mapped", [(0, 1, 2), (1,), (0, 2), ()], ids=str)
@pytest.mark.parametrize(
    ("dim", "heads", "share", "count", "batch"),
    [(64, 2, 3, 1, 2), (80, 2, 2, 5, 3), (128, 2, 4, 1, 2), (96, 1, 8, 70, 1), (256, 1, 1, 1, 1)],
)
def test_a_kernel_turns_as_plain_torch_does(
    dim: int, heads: int, share: int, count: int, batch: int, mapped: tuple[int, ...],
    device: torch.device,
) -> None:  # fmt: skip
    """Tensors that lie in memory as models make them, some of them without a map."""
    tensors = [
        drawn(batch, count, heads, dim, seed=1).transpose(1, 2),
        drawn(batch, heads, count, dim, seed=2),
        drawn(batch, count, heads * share, dim, seed=3).transpose(1, 2),
    ]
    tensors = [x.bfloat16().to(device) for x in tensors]
    maps = [
        Map(drawn(heads, dim, dim, seed=i).to(device) / dim**0.5, drawn(heads, dim).to(device))
        for i in range(3)
    ]
    jobs = [(x, maps[i] if i in mapped else None) for i, x in enumerate(tensors)]
    with implementation("triton"):
        found = turn(*jobs)
    for i, (x, y) in enumerate(zip(tensors, found, strict=True)):
        if i not in mapped:
            assert y is x
            continue
        true = maps[i].plain(x)
        assert y.dtype == x.dtype and y.shape == x.shape
        # bfloat16's last bit where sums end elsewhere
        torch.testing.assert_close(y.float(), true.float(), atol=1e-3, rtol=2**-7)


def test_a_query_head_takes_the_map_of_the_kv_head_that_it_shares(device: torch.device) -> None:
    matrix = torch.stack([torch.eye(64), 2 * torch.eye(64)]).to(device)
    x = drawn(1, 4, 1, 64).to(device)
    (y,) = turn((x, Map(matrix, torch.ones(2, 64, device=device))))
    torch.testing.assert_close(y[:, :2], x[:, :2] + 1)
    torch.testing.assert_close(y[:, 2:], 2 * x[:, 2:] + 1)
