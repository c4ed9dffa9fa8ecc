"""Laws of kvtune/heads.py: heads that are stored in ways of their own, in one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import layer as layers
from kvtune import parts
from kvtune.cache import CompressedCache, layer_bytes, load, sites, weigh
from kvtune.chains import Chain
from kvtune.errors import IntegrityError, UnsupportedError
from kvtune.heads import HeadedLayer, _places, make_layer, picked
from kvtune.layer import CompressedLayer
from kvtune.models import facts
from kvtune.policy import Policy, to_entry
from kvtune.recipe import Recipe, loads

KV, SHARE, DIM = 4, 2, 64
Sides = tuple[Chain, Chain]
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def chain(bits: int, **settings: Any) -> Chain:
    codec: Any = parts.parse({"use": "affine", "bits": bits, "group": "head", **settings})
    return Chain((codec,))


FOUR, TWO = (chain(4), chain(4)), (chain(2), chain(3))
BLOCKS = (chain(2, axis="channel", group=128), chain(4))
DENSE = (Chain(), Chain())
SPREAD = {
    "neighbours": [FOUR, FOUR, TWO, TWO],
    "in turns": [FOUR, TWO, FOUR, TWO],
    "each for itself": [FOUR, TWO, BLOCKS, (chain(8), Chain())],
    "blocks of two sizes": [TWO, BLOCKS, BLOCKS, TWO],
    "some dense": [DENSE, FOUR, DENSE, TWO],
}
every_spread = pytest.mark.parametrize("heads", SPREAD.values(), ids=SPREAD)


def made(heads: list[Sides], sinks: int = 3, recent: int = 7) -> Any:
    return make_layer(Policy.by_head(sinks, recent, heads), sites(0, None, {}))


def given(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, n, D], keys and values [B, H, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(batch, count, own, DIM, generator=generator, dtype=torch.float64)
        for own in (KV * SHARE, KV, KV)
    )
    return query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def play(layer: CompressedLayer, sizes: list[int], batch: int = 2, seed: int = 0) -> Tensor:
    out, end = [], 0
    query, keys, values = given(batch, sum(sizes), seed)
    for size in sizes:
        start, end = end, end + size
        layer.update(keys[:, :, start:end], values[:, :, start:end])
        out.append(layer.attend(query[:, :, start:end], None, None, None))
    return torch.cat(out, 2)


SIZES = [150, *[1] * 30, 90, 1, 1]


@every_spread
def test_each_head_answers_as_in_a_layer_in_which_all_do_as_it_does(heads: list[Sides]) -> None:
    found = play(made(heads), SIZES)
    for head, sides in enumerate(heads):
        alike = play(made([sides] * KV), SIZES)
        own = slice(head * SHARE, (head + 1) * SHARE)
        torch.testing.assert_close(found[:, own], alike[:, own], **TIGHT)


@every_spread
def test_a_layer_holds_what_its_heads_hold(heads: list[Sides]) -> None:
    layer = made(heads)
    query, keys, values = (x.bfloat16() for x in given(1, 700))
    layer.update(keys, values)
    layer.attend(query, None, None, None)
    whole = layer_bytes(layer.policy, KV, DIM, 700)
    assert layer.side_bytes == whole
    alone = [layer_bytes(Policy.by_head(3, 7, [sides]), 1, DIM, 700) for sides in heads]
    assert whole == tuple(map(sum, zip(*alone, strict=True)))


@every_spread
def test_a_step_reads_what_a_chunk_reads(heads: list[Sides]) -> None:
    expected = play(made(heads), [60, *[1] * 150])
    for sizes in ([60, 150], [60, 1, 64, 80, 5], [60, *[3] * 50]):
        torch.testing.assert_close(play(made(heads), sizes), expected, **TIGHT)


@every_spread
def test_a_filled_layer_and_its_fork_go_on_as_a_prompt_does(heads: list[Sides]) -> None:
    asked, filled = made(heads), made(heads)
    play(asked, [150])
    _, keys, values = given(2, 150)
    filled.fill(keys, values)
    twin, other = filled.fork(), filled.fork()
    expected = play(asked, [1] * 80, seed=1)
    play(other, [80], seed=2)
    torch.testing.assert_close(play(twin, [40, 40], seed=1), expected, **TIGHT)
    torch.testing.assert_close(play(filled, [1] * 80, seed=1), expected, **TIGHT)
    assert filled.get_seq_length() == twin.get_seq_length() == 230


@every_spread
def test_rows_follow_their_beams_in_every_head(heads: list[Sides]) -> None:
    layer = made(heads)
    play(layer, [150, 20], batch=3)
    moved = layer.fork()
    moved.reorder_cache(torch.tensor([2, 0, 2]))
    moved.batch_repeat_interleave(2)
    order = [2, 2, 0, 0, 2, 2]
    query, keys, values = given(3, 1, seed=4)
    layer.update(keys, values)
    moved.update(keys[order], values[order])
    out = layer.attend(query, None, None, None)
    found = moved.attend(query[order], None, None, None)
    torch.testing.assert_close(found, out[order], **TIGHT)


def test_a_crop_is_refused_by_all_heads_or_by_none() -> None:
    """Blocks of two sizes: after 210 tokens one group has paged 128 and the other 192."""
    layer, never = made([TWO, BLOCKS, BLOCKS, TWO]), made([TWO, BLOCKS, BLOCKS, TWO])
    play(layer, [210])
    play(never, [210])
    windows = sorted(part.exact for _, part in layer.parts)
    assert windows[0] < windows[-1]
    with pytest.raises(UnsupportedError, match=f"only the last {windows[0]} are still exact"):
        layer.crop(-windows[0] - 1)
    assert [part.get_seq_length() for _, part in layer.parts] == [210, 210]
    layer.crop(0)
    play(layer, [5], seed=3)
    layer.crop(-5)
    assert layer.get_seq_length() == 210
    torch.testing.assert_close(play(layer, [60], seed=1), play(never, [60], seed=1), **TIGHT)
    for own in (layer, made([TWO, TWO, TWO, FOUR])):
        with pytest.raises(UnsupportedError, match="negative"):
            own.crop(3)


@every_spread
def test_a_reset_layer_is_as_new(heads: list[Sides]) -> None:
    layer = made(heads)
    expected = play(layer, SIZES)
    layer.reset()
    assert layer.nbytes == layer.get_seq_length() == 0
    assert torch.equal(play(layer, SIZES), expected)


FUSED = {name: SPREAD[name] for name in ("neighbours", "in turns", "blocks of two sizes")}


@pytest.mark.parametrize("heads", FUSED.values(), ids=FUSED)
def test_kernels_rows_answer_as_plain_rows_do_in_every_head(
    heads: list[Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [150, *[1] * 20, 90, 1]
    plain, fused = made(heads), made(heads)
    expected = play(plain, sizes)
    monkeypatch.setattr(layers, "serves", lambda policy, keys: True)
    torch.testing.assert_close(play(fused, sizes), expected, atol=1e-5, rtol=1e-5)
    assert all(group.rows.ragged for group in fused.groups)
    twin = fused.fork()
    torch.testing.assert_close(play(twin, [1] * 70, seed=1), play(fused, [1] * 70, seed=1))
    twin.reorder_cache(torch.tensor([1, 0]))
    twin.crop(-2)


def test_bits_that_heads_ask_for_are_felt_in_those_heads_alone() -> None:
    coarse, fine = (chain(2), chain(2)), (chain(8), chain(8))
    dense = play(made([DENSE] * KV), SIZES)
    error = (play(made([fine, coarse, fine, coarse]), SIZES) - dense).abs().amax((0, 2, 3))
    worst = error.view(KV, SHARE).amax(1)
    assert worst[[1, 3]].min() > 10 * worst[[0, 2]].max() > 0


def test_a_recipe_of_heads_runs_and_weighs_what_it_says(llama: Any, play: Any, draw: Any) -> None:
    policy = Policy.by_head(4, 64, [FOUR, TWO])
    recipe = Recipe(layers=(to_entry(policy, "0-1"), to_entry(Policy(), "rest")))
    known, cache, tokens = facts(llama.config), load(recipe, llama), draw(1, 300)
    assert isinstance(cache, CompressedCache)
    play(llama, cache, tokens, [280, *[1] * 20])
    assert [isinstance(layer, HeadedLayer) for layer in cache.layers] == [True, True, False, False]
    found = weigh(recipe.policies(known), known, 4096)
    assert found.payload_bits == ((4 + 4 + 2 + 3) / 4 + 16) / 2
    alike = [
        weigh((Policy.by_head(4, 64, [own, own]),) * 2 + (Policy(),) * 2, known, 4096).bytes
        for own in (FOUR, TWO)
    ]
    assert 2 * found.bytes == sum(alike)


def test_a_place_in_a_recipe_is_told_as_the_file_has_it() -> None:
    text = 'kvtune = 1\n[[layers]]\nspan = "all"\n[[layers.heads]]\nspan = "0"\nsinks = 4\n'
    with pytest.raises(IntegrityError, match=r"unknown key layers\.0\.heads\.0\.sinks\. Known"):
        loads(text)


def test_which_heads_a_group_has_is_told_a_device_once() -> None:
    """Else each step would copy indices from the host, which no CUDA graph can hold."""
    x = torch.arange(8.0).view(1, 8, 1, 1)
    with torch.inference_mode():
        assert picked(x, (0, 3), 2).flatten().tolist() == [0, 1, 6, 7]
    assert _places((0, 3), 2, x.device) is _places((0, 3), 2, x.device)
    assert not _places((0, 3), 2, x.device).is_inference()  # type: ignore[union-attr]
    assert picked(x, (1, 2), 2).flatten().tolist() == [2, 3, 4, 5]
    assert picked(x, (1, 2), 2).data_ptr() == x[:, 2:].data_ptr(), "neighbours are a view"
