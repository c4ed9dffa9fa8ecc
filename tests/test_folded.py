"""Laws of kvtune/folded.py: turned queries read turned pages as plain rows read plain ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from kvtune_kernels import Workspace, implementation
from torch import Tensor

from kvtune.cache import sites
from kvtune.chains import Chain
from kvtune.folded import Folded
from kvtune.fused import FusedRows, serves
from kvtune.parts import Codec, Seen, Site, parse
from kvtune.policy import Policy
from kvtune.rows import Rows

HEADS, SHARE, DIM = 2, 3, 64
CHAINS = {
    "klt": ([{"use": "klt"}, {"use": "waterfill", "bits": 2.0}], [{"use": "normal"}]),
    "centred": (
        [{"use": "centre"}, {"use": "klt"}, {"use": "waterfill", "bits": 2.5, "group": 64}],
        [{"use": "hadamard"}, {"use": "normal", "bits": 3}],
    ),
    "promoted": ([{"use": "promote"}], [{"use": "hadamard"}, {"use": "affine", "group": "head"}]),
    "turned": (
        [{"use": "hadamard"}, {"use": "affine", "axis": "channel", "group": 32}],
        [{"use": "rotate"}, {"use": "centre"}, {"use": "normal", "bits": 4, "group": 32}],
    ),
}


def drawn(heads: int, batch: int, count: int, seed: int) -> Tensor:
    """[B, H, T, D] with correlated channels of different sizes, and offsets."""
    spread = torch.logspace(-0.7, 0.7, DIM) * torch.eye(DIM)
    generator = torch.Generator().manual_seed(99)
    basis = torch.linalg.qr(torch.randn(heads, DIM, DIM, generator=generator))[0]
    offset = torch.randn(heads, 1, DIM, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, count, DIM, generator=generator) @ spread @ basis + offset


def given(batch: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, n, D], keys and values [B, H, n, D]."""
    query = drawn(HEADS * SHARE, batch, count, seed) * 0.15
    return query, drawn(HEADS, batch, count, seed + 1), drawn(HEADS, batch, count, seed + 2)


def seen_of(x: Tensor, readers: Tensor, is_keys: bool) -> Seen:
    """What calibration sees of x [H, n, D] and of what reads it."""
    mean = x.mean(1)
    centred = x - mean[:, None]
    read = readers.transpose(1, 2) @ readers / readers.shape[1]
    covariance = centred.transpose(1, 2) @ centred / x.shape[1]
    return Seen(mean, covariance, read, x, read, readers, is_keys)


class Layer:
    """A policy whose chains are fitted, and its sites."""

    def __init__(self, name: str, sinks: int = 4, recent: int = 20) -> None:
        query, keys, values = (x.double().transpose(0, 1).flatten(1, 2) for x in given(2, 300, 50))
        readers = query.unflatten(0, (HEADS, SHARE)).flatten(1, 2)
        self.tensors: dict[str, Tensor] = {}
        chains = []
        for side, x, tables in zip(("keys", "values"), (keys, values), CHAINS[name], strict=True):
            chains.append(self._fitted(side, seen_of(x, readers, side == "keys"), tables))
        self.policy = Policy(sinks=sinks, recent=recent, keys=chains[0], values=chains[1])
        self.sites = sites(0, None, self.tensors)

    def _fitted(self, side: Any, seen: Seen, tables: Sequence[Mapping[str, Any]]) -> Chain:
        codecs, found = [], {}
        for table in tables:
            codec = parse(table)
            assert isinstance(codec, Codec)
            codecs.append(codec)
            found |= {f"{codec.name()}.{name}": x for name, x in codec.fit(seen).items()}
            if codec.linear:
                site = Site(0, side, torch.arange(0), torch.float32, None, found)
                seen = seen.behind(codec.fold(site, HEADS, DIM))
        self.tensors |= {f"layer.0.{side}.{name}": x for name, x in found.items()}
        return Chain(tuple(codecs))

    def fused(self, *pads: int) -> FusedRows:
        return FusedRows(self.policy, list(pads), Workspace(), self.sites)

    def plain(self) -> Rows:
        return Rows(self.policy, self.sites)


@pytest.fixture(params=CHAINS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


def play(
    rows: Any, sizes: Sequence[int], batch: int = 2, seed: int = 0, softcap: float | None = None
) -> Tensor:
    """Runs chunks through rows; returns all answers."""
    tokens = given(batch, sum(sizes), seed)
    out, end = [], 0
    for size in sizes:
        start, end = end, end + size
        out.append(rows.attend(*(x[:, :, start:end] for x in tokens), None, softcap))
    return torch.cat(out, 2)


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


SIZES = ([200, *[1] * 100], [5, 150, 1, 1, 90, 3])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_folded_rows_answer_as_plain_rows_do(
    layer: Layer, sizes: list[int], softcap: float | None
) -> None:
    """In float32; a cap sees what softmax does not: the keys' shift."""
    ours, theirs = layer.fused(0, 0), layer.plain()
    true = play(theirs, sizes, softcap=softcap)
    assert error(play(ours, sizes, softcap=softcap), true) < 1e-3
    for one, two in zip(ours.read(torch.float32), theirs.read(torch.float32), strict=True):
        # what has just left the window is paged at once here, and with the next token there
        far = ((one - two).abs() > 1e-3 * two.abs().max()).any(-1).float().mean()
        assert far <= ours.window.block / sum(sizes) + 0.01


def test_each_row_of_a_padded_batch_is_as_the_row_alone(layer: Layer) -> None:
    sizes, pads = [200, 1, 1, 60, 1], [70, 0, 3]
    together, tokens = play(layer.fused(*pads), sizes, 3), given(3, sum(sizes), 0)
    for row, pad in enumerate(pads):
        alone, out, end = layer.plain(), [], 0
        for size in sizes:
            start, end = max(end, pad), end + size
            own = (x[row : row + 1, :, start:end] for x in tokens)
            out.append(alone.attend(*own, None, None))
        assert error(together[row : row + 1, :, pad:], torch.cat(out, 2)) < 1e-3


def test_forks_chosen_rows_and_crops_read_what_was_stored(layer: Layer) -> None:
    rows, never = layer.fused(0, 0), layer.fused(0, 0)
    for one in (rows, never):
        play(one, [200, 1, 1])
    twin, turned = rows.fork(), rows.select(torch.tensor([1, 0]))
    for seed in range(300, 305):
        rows.attend(*given(2, 1, seed), None, None)
    rows.crop(5)
    for seed in range(400, 480):
        tokens = given(2, 1, seed)
        true = never.attend(*tokens, None, None)
        for found in (rows, twin):
            torch.testing.assert_close(found.attend(*tokens, None, None), true)
        swapped = turned.attend(*(x[[1, 0]] for x in tokens), None, None)
        torch.testing.assert_close(swapped, true[[1, 0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("chains", "softcap"), [("klt", None), ("centred", 3.0)])
def test_kernels_read_folded_rows_as_plain_torch_does(chains: str, softcap: float | None) -> None:
    """In bfloat16: a prompt, a step, and a chunk that closes a block."""
    pytest.importorskip("triton")
    layer = Layer(chains)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [153, 1, 25, 1]
    layer.sites = sites(0, None, {name: x.to(device) for name, x in layer.tensors.items()})
    tokens = [x.to(device, torch.bfloat16) for x in given(1, sum(sizes), 0)]
    answers = {}
    for impl in ("reference", "triton"):
        with implementation(impl):
            rows, out, end = layer.fused(0), [], 0
            if impl == "triton":
                assert serves(layer.policy, tokens[1])
            for size in sizes:
                start, end = end, end + size
                own = (x[:, :, start:end] for x in tokens)
                out.append(rows.attend(*own, None, softcap))
            answers[impl] = torch.cat(out[1:], 2).float()
    assert error(answers["triton"], answers["reference"]) < 0.02


def test_without_maps_nothing_is_turned() -> None:
    """The same tensors come back, not copies."""
    folded, tokens = Folded(), given(1, 3, 0)
    assert all(one is two for one, two in zip(folded.enter(*tokens), tokens, strict=True))
    assert folded.leave(tokens[0]) is tokens[0] and folded.bias(tokens[0], None) is None
