"""Laws of kvtune/cache.py: what is read depends on positions alone, and what is stored stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune import parts
from kvtune.attention import NAME
from kvtune.bonds import Member
from kvtune.cache import load
from kvtune.grouped import GroupedLayer
from kvtune.layer import CompressedLayer
from kvtune.models import facts
from kvtune.parts import Code, Codec, Site
from kvtune.policy import Policy
from kvtune.sharing import pieces

MORE = 58  # tokens after a prompt
STEPS = [1] * MORE
# float64 with float32 dequantisation of equal codes: what remains is the order of sums
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def layers(cache: Any) -> list[CompressedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def prompt_of(cache: Any) -> int:
    """Returns a prompt's length after which every layer closes a page within MORE tokens."""
    held = [
        (layer.policy.sinks + layer.policy.recent, layer.policy.first) for layer in layers(cache)
    ]
    return max([43, *(window + first - 20 for window, first in held)])


def stored(layer: CompressedLayer) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the pages of a layer, with its name."""
    for number, (_, _, rows) in enumerate(layer.groups):
        tiers = rows.tiers if layer.policy.select else [(rows.keys, rows.values)]
        for side, pages in (
            (f"{n}.{side}", tier[side]) for n, tier in enumerate(tiers) for side in (0, 1)
        ):
            beside = []
            if isinstance(pages, Member):
                beside, pages = pages._store._sides, pages._store._body
            if pages._body is None:
                continue
            held = [pages._body, *(grown for more in pages._sides for grown in more), *beside]
            for index, grown in enumerate(held):
                yield f"{number}.{side}.{index}", grown.tensor


def cut(cache: Any, seen: int, sizes: list[int]) -> list[int]:
    """Cuts chunks where a group of layers takes in a block, as it does token by token."""
    policies, found = [layer.policy for layer in layers(cache)], []
    for size in sizes:
        found += pieces(policies, seen, size)
        seen += size
    return found


def paged(policy: Policy, every: tuple[int, ...], count: int) -> Iterator[tuple[Any, ...]]:
    """Yields the heads, the chains and the length of each tier behind `count` tokens."""
    if policy.split is None:
        for heads, own in policy.parts() or ((every, policy),):
            yield heads, (own.keys, own.values), own.due(count)
        return
    blocks = policy.due(count) // policy.block
    yield every, (policy.keys, policy.values), blocks * policy.split.kept
    if policy.rest:
        yield every, policy.rest, blocks * policy.split.rest


def snapshot(cache: Any) -> dict[tuple[int, str], Tensor]:
    return {
        (index, name): tensor.clone()
        for index, layer in enumerate(layers(cache))
        for name, tensor in stored(layer)
    }


def codecs() -> list[type[Codec]]:
    found = [parts.find(name) for name in parts.names()]
    return [kind for kind in found if issubclass(kind, Codec)]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str, str, int]]:
    """Counts how often each (layer, side, codec, position) is encoded, head by head."""
    seen: Counter[tuple[int, str, str, int]] = Counter()

    def counting(own: Callable[..., Code]) -> Callable[..., Code]:
        def encode(self: Codec, x: Tensor, site: Site) -> Code:
            assert x.shape[2] == len(site.positions)
            for position in site.positions.tolist():
                seen[site.layer, site.side, self.name(), position] += x.shape[1]
            return own(self, x, site)

        return encode

    for kind in codecs():
        monkeypatch.setattr(kind, "encode", counting(kind.encode))
    return seen


def test_any_split_into_chunks_equals_step_by_step(
    case: Any, play: Callable[..., Tensor], draw: Callable[..., Tensor]
) -> None:
    model, make = case
    prompt = prompt_of(make())
    tokens = draw(2, prompt + MORE)
    expected = play(model, make(), tokens, [prompt, *STEPS])
    assert expected.isfinite().all()
    cuts = [[MORE], [1, 30, 2, MORE - 33]]
    if model.config.model_type == "llama":  # how a text is cut does not ask what reads it
        cuts += [[3] * 19 + [1], [7] * 8 + [2]]
    for sizes in cuts:
        found = play(model, make(), tokens, [prompt, *cut(make(), prompt, sizes)])
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("recipe_name", ["k4v2-windowed", "k2v4-bare", "derope-k4"])
@pytest.mark.parametrize("prompt", [1, 2, 3, 5])
def test_a_prompt_shorter_than_sinks_and_window_is_no_exception(
    llama: Any, prompt: int, recipe_name: str, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe, tokens = recipe_of(recipe_name), draw(1, prompt + 90)
    expected = play(llama, load(recipe, llama), tokens, [prompt, *[1] * 90])
    for sizes in ([prompt, 90], [prompt, 2, 80, 8]):
        found = play(llama, load(recipe, llama), tokens, sizes)
        torch.testing.assert_close(found, expected, **TIGHT)


def test_compression_is_felt_where_it_is_drastic(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    """Else the laws of this file would hold for a cache that compresses nothing."""
    tokens = draw(1, 80 + MORE)
    dense = play(llama, DynamicCache(config=llama.config), tokens, [80, *STEPS])
    for name, least, most in (("k2v4-bare", 3.0, 1e9), ("k8v8", 1e-6, 1.0)):
        found = play(llama, load(recipe_of(name), llama), tokens, [80, *STEPS])
        error = (found - dense)[:, 80:].abs().max().item()
        assert least < error < most, name


def test_eight_bits_are_hardly_felt_by_any_model(
    name: str, model: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    """Large key biases among them: they cost nothing when only the spread is quantised."""
    tokens, sizes = draw(2, 80 + MORE), [80, *STEPS]
    found = play(model, load(recipe_of("k8v8"), model), tokens, sizes)[:, 80:].log_softmax(-1)
    dense = play(model, DynamicCache(config=model.config), tokens, sizes)[:, 80:].log_softmax(-1)
    divergence = (dense.exp() * (dense - found)).sum(-1).mean()
    assert -1e-12 < divergence < 3e-3


def test_a_prompt_sees_itself_exactly(case: Any, play: Any, draw: Any) -> None:
    model, make = case
    tokens = draw(2, 90)
    found = play(model, make(), tokens, [90])
    dense = play(model, DynamicCache(config=model.config), tokens, [90])
    torch.testing.assert_close(found, dense, **TIGHT)


def test_a_plain_cache_is_answered_as_without_kvtune(
    name: str, model: Any, play: Any, draw: Any
) -> None:
    tokens, sizes = draw(2, 43 + MORE), [43, 1, 1, 7, MORE - 9]
    model.set_attn_implementation("eager")
    expected = play(model, DynamicCache(config=model.config), tokens, sizes)
    model.set_attn_implementation(NAME)
    found = play(model, DynamicCache(config=model.config), tokens, sizes)
    # transformers' eager attention takes its softmax in float32, whatever the model's dtype
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_derope_alone_is_dense(name: str, model: Any, written: Any, play: Any, draw: Any) -> None:
    recipe = written(keys='use = "derope"', sinks=2, recent=5)
    tokens, sizes = draw(2, 43 + MORE), [43, *STEPS]
    found = play(model, load(recipe, model), tokens, sizes)
    dense = play(model, DynamicCache(config=model.config), tokens, sizes)
    torch.testing.assert_close(found, dense, **TIGHT)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_derope_alone_is_dense_under_scaled_frequencies(
    scaling: dict[str, Any], model_of: Any, written: Any, play: Any, draw: Any
) -> None:
    model = model_of("llama", rope_parameters={"rope_theta": 1e4, **scaling})
    recipe = written(keys='use = "derope"')
    tokens, sizes = draw(1, 43 + MORE), [43, *STEPS]
    found = play(model, load(recipe, model), tokens, sizes)
    dense = play(model, DynamicCache(config=model.config), tokens, sizes)
    torch.testing.assert_close(found, dense, **TIGHT)


def test_a_page_never_changes_once_it_is_written(llama_case: Any, play: Any, draw: Any) -> None:
    model, make = llama_case
    cache = make()
    prompt = prompt_of(cache) + 40
    tokens = draw(2, prompt + 90)
    play(model, cache, tokens[:, :prompt], [prompt])
    before = snapshot(cache)
    for start, end in ((0, 1), (1, 20), (20, 90)):
        play(model, cache, tokens[:, prompt + start : prompt + end], [end - start])
        after = snapshot(cache)
        for key, page in before.items():
            assert torch.equal(after[key][:, :, : page.shape[2]], page), key
        before = after
    assert {layer for layer, _ in before} == set(range(len(layers(cache))))
    assert all(page.shape[2] > 0 for page in before.values())


def test_each_token_is_encoded_once_at_its_true_index(
    case: Any, play: Any, draw: Any, encoded: Counter[tuple[int, str, str, int]]
) -> None:
    model, make = case
    cache = make()
    prompt = prompt_of(cache)
    count = prompt + 91
    play(model, cache, draw(1, count), [prompt, 1, 1, 30, 1, 58])
    expected: Counter[tuple[int, str, str, int]] = Counter()
    for index, layer in enumerate(cache.layers):
        later = isinstance(layer, GroupedLayer) and layer._index > 0  # the first stands for all
        if isinstance(layer, CompressedLayer) and not later:
            known = facts(model.config).layers[index]
            every, dim = tuple(range(known.kv_heads)), known.head_dim
            for heads, chains, length in paged(layer.policy, every, count):
                assert length > 0
                first = layer.policy.sinks  # of a tier to which tokens are selected: its places
                for side, chain in zip(("keys", "values"), chains, strict=True):
                    for codec, shape in chain.shapes(len(heads), dim):
                        for position in range(first, first + length):
                            expected[index, side, codec.name(), position] += shape[0]
    assert encoded == expected


def test_a_forked_layer_lives_its_own_life(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe, tokens = recipe_of("k4v2-windowed"), draw(1, 240)
    whole, trunk = load(recipe, llama), load(recipe, llama)
    play(llama, trunk, tokens[:, :120], [120])
    play(llama, whole, tokens[:, :120], [120])
    branch = trunk.fresh()
    branch.layers = [layer.fork() for layer in trunk.layers]
    held = snapshot(trunk)
    other = play(llama, branch, draw(1, 120, seed=5), [60, 60])
    assert all(torch.equal(page, held[key]) for key, page in snapshot(trunk).items())
    found = play(llama, trunk, tokens[:, 120:], [1] * 120)
    torch.testing.assert_close(found, play(llama, whole, tokens[:, 120:], [1] * 120), **TIGHT)
    assert not torch.allclose(other, found)


def test_a_filled_layer_is_what_a_prompt_leaves(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe, tokens = recipe_of("derope-k4"), draw(2, 150)
    asked, filled = load(recipe, llama), load(recipe, llama)
    dense = DynamicCache(config=llama.config)
    play(llama, asked, tokens[:, :100], [100])
    play(llama, dense, tokens[:, :100], [100])
    for layer, held in zip(filled.layers, dense.layers, strict=True):
        layer.fill(held.keys, held.values)
    rest = tokens[:, 100:]
    torch.testing.assert_close(
        play(llama, filled, rest, [50]), play(llama, asked, rest, [50]), **TIGHT
    )
    assert filled.nbytes == asked.nbytes
    filled.batch_select_indices(torch.tensor([1, 0]))
    asked.batch_select_indices(torch.tensor([1, 0]))
    last = draw(2, 3)
    torch.testing.assert_close(
        play(llama, filled, last, [3]), play(llama, asked, last, [3]), **TIGHT
    )


def test_a_reset_cache_is_as_new(llama_case: Any, play: Any, draw: Any) -> None:
    model, make = llama_case
    cache, tokens = make(), draw(2, 90)
    expected = play(model, cache, tokens, [50, 1, 39])
    play(model, cache, draw(2, 20, seed=3), [20])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(play(model, cache, tokens, [50, 1, 39]), expected, **TIGHT)
    torch.testing.assert_close(play(model, cache.fresh(), tokens, [50, 1, 39]), expected, **TIGHT)


def test_a_reset_layer_is_as_new(llama: Any, recipe_of: Any, play: Any, draw: Any) -> None:
    cache, tokens = load(recipe_of("k4v2-windowed"), llama), draw(2, 120)
    expected = play(llama, cache, tokens, [110, 10])
    for layer in cache.layers:
        layer.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    torch.testing.assert_close(play(llama, cache, tokens, [110, 10]), expected, **TIGHT)
