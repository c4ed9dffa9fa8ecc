"""Laws of refusal: what a compressed cache cannot do raises by name, and never answers wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fits import fits_of
from torch import Tensor
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.attention import Reading
from kvtune.cache import CompressedCache, load
from kvtune.errors import IntegrityError, MissingInputError, UnsupportedError, UsageError
from kvtune.models import facts, fingerprint
from kvtune.recipe import ArtifactRef, ModelBinding, Recipe
from kvtune.tensors import Artifact

WINDOWED = "k4v2-windowed"
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture
def prompted(llama: Any, recipe_of: Any, play: Any, draw: Any) -> CompressedCache:
    """A cache after a prompt of 140 tokens: 3 sinks, 64 in pages, 73 in the window."""
    cache = load(recipe_of(WINDOWED), llama)
    play(llama, cache, draw(1, 140), [140])
    return cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_on_a_compressed_cache_is_refused(
    llama: Any, attention: str, recipe_of: Any, draw: Any
) -> None:
    cache = load(recipe_of(WINDOWED), llama)
    llama.set_attn_implementation(attention)
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        llama(draw(1, 8), past_key_values=cache)


def test_a_reading_is_no_tensor(prompted: CompressedCache) -> None:
    with pytest.raises(UnsupportedError, match=r"\.shape"):
        Reading(prompted.layers[0]).shape  # noqa: B018


def causal(count: int, length: int) -> Tensor:
    return torch.ones(1, 1, count, length, dtype=torch.bool).tril(length - count)


def custom_masks() -> dict[str, Tensor]:
    """Masks of 6 queries over 6 tokens that are not causal with left padding."""
    plain = causal(6, 6)
    window, swapped, packed = plain.clone(), plain.clone(), plain.clone()
    window[..., 4:, 0] = False
    swapped[..., 2, 0], swapped[..., 2, 5] = False, True  # as many as a causal row sees
    packed[..., 3:, :3] = False
    return {
        "additive": torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~plain, -1e30),
        "bidirectional": torch.ones(1, 1, 6, 6, dtype=torch.bool),
        "windowed": window,
        "swapped": swapped,
        "packed": packed,
    }


@pytest.mark.parametrize("kind", custom_masks())
def test_a_custom_mask_is_refused(llama: Any, kind: str, recipe_of: Any, draw: Any) -> None:
    cache = load(recipe_of(WINDOWED), llama)
    with pytest.raises(UnsupportedError, match="mask"):
        llama(draw(1, 6), attention_mask=custom_masks()[kind], past_key_values=cache)


def test_a_four_dimensional_mask_that_is_plainly_causal_is_served(
    llama: Any, recipe_of: Any, draw: Any
) -> None:
    tokens, recipe = draw(2, 6), recipe_of(WINDOWED)
    given = llama(tokens, attention_mask=causal(6, 6), past_key_values=load(recipe, llama))
    plain = llama(tokens, past_key_values=load(recipe, llama))
    torch.testing.assert_close(given.logits, plain.logits, **TIGHT)


def test_offloading_is_refused(prompted: CompressedCache) -> None:
    for move in (prompted.layers[0].offload, prompted.layers[0].prefetch):
        with pytest.raises(UnsupportedError, match="offload"):
            move()
    with pytest.raises(UnsupportedError, match="offload"):
        prompted.offload(0)


def test_a_compressed_cache_does_not_claim_what_it_cannot(prompted: CompressedCache) -> None:
    assert not prompted.is_croppable
    assert not prompted.is_compileable
    assert prompted.get_max_length() == -1


@pytest.mark.parametrize("count", [74, 140, 1000])
def test_a_crop_beyond_the_exact_window_is_refused(prompted: CompressedCache, count: int) -> None:
    with pytest.raises(UnsupportedError, match=f"crop {count} tokens: only the last 73"):
        prompted.crop(-count)
    assert prompted.get_seq_length() == 140, "a refused crop takes nothing"


def test_a_crop_to_a_length_is_refused(prompted: CompressedCache) -> None:
    with pytest.raises(UnsupportedError, match="negative"):
        prompted.crop(100)


@pytest.mark.parametrize(("count", "windows"), [(98, (98, 78)), (140, (73, 120))])
def test_a_crop_that_one_row_refuses_takes_nothing_from_the_others(
    llama: Any, count: int, windows: tuple[int, int], recipe_of: Any, draw: Any, play: Any
) -> None:
    """Rows of different padding hold windows of different length."""
    tokens, recipe = draw(2, count + 9), recipe_of(WINDOWED)
    mask = (torch.arange(count + 9) >= torch.tensor([[0], [20]])).long()
    cache = load(recipe, llama)
    play(llama, cache, tokens[:, :count], [count], mask[:, :count])
    assert tuple(group.rows.exact for group in cache.layers[0].groups) == windows
    with pytest.raises(UnsupportedError, match="crop"):
        cache.crop(-min(windows) - 1)
    found = play(llama, cache, tokens[:, count:], [9], mask)
    expected = play(llama, load(recipe, llama), tokens, [count, 9], mask)[:, count:]
    torch.testing.assert_close(found, expected, **TIGHT)


def test_a_row_that_is_cropped_to_its_padding_starts_anew(
    llama: Any, recipe_of: Any, draw: Any, play: Any
) -> None:
    tokens, recipe = draw(2, 90), recipe_of(WINDOWED)
    mask = (torch.arange(90) >= torch.tensor([[0], [12]])).long()
    cache = load(recipe, llama)
    play(llama, cache, tokens[:, :20], [20], mask[:, :20])
    cache.crop(-8)
    found = play(llama, cache, tokens[:, 12:], [78], mask)
    alone = play(llama, load(recipe, llama), tokens[1:, 12:], [78])
    torch.testing.assert_close(found[1], alone[0], **TIGHT)


@pytest.mark.parametrize("kept", [67, 68, 70, 90, 139])
@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7] * 7 + [1]])
def test_after_a_crop_chunks_still_equal_steps(
    llama: Any, kept: int, sizes: list[int], prompted: CompressedCache, draw: Any, play: Any
) -> None:
    """What is in pages by then stays there, however short the text becomes."""
    prompted.crop(kept - 140)
    assert prompted.get_seq_length() == kept
    found = play(llama, prompted, draw(1, 50, seed=9), sizes)
    again = load_again(prompted, llama, draw, play)
    again.crop(kept - 140)
    expected = play(llama, again, draw(1, 50, seed=9), [1] * 50)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert found.isfinite().all()


def load_again(cache: CompressedCache, model: Any, draw: Any, play: Any) -> CompressedCache:
    again = cache.fresh()
    play(model, again, draw(1, 140), [140])
    return again


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 10, 30])
def test_a_crop_reaches_into_the_sinks_while_nothing_is_paged(
    llama: Any, kept: int, recipe_of: Any, draw: Any, play: Any
) -> None:
    recipe, tokens = recipe_of(WINDOWED), draw(1, 60)
    cache = load(recipe, llama)
    play(llama, cache, tokens[:, :40], [40])
    cache.crop(kept - 40)
    assert cache.get_seq_length() == kept
    found = play(llama, cache, tokens[:, kept:], [60 - kept])
    expected = play(llama, DynamicCache(config=llama.config), tokens, [60])[:, kept:]
    torch.testing.assert_close(found, expected, **TIGHT)


def binding(model: Any, **changes: Any) -> ModelBinding:
    layer = facts(model.config).layers[0]
    own = {
        "name": "somebody/model",
        "fingerprint": fingerprint(model),
        "architecture": "LlamaForCausalLM",
        "layers": len(facts(model.config).layers),
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
    }
    return ModelBinding(**{**own, **changes})


def test_a_recipe_of_another_model_is_refused_unless_forced(
    llama: Any, model_of: Any, recipe_of: Any
) -> None:
    bound = recipe_of(WINDOWED).model_copy(update={"model": binding(llama)})
    other = model_of("llama", seed=1)
    assert isinstance(load(bound, llama), CompressedCache)
    with pytest.raises(IntegrityError, match=r"somebody/model.*--force") as caught:
        load(bound, other)
    assert caught.value.exit_code == 4
    assert isinstance(load(bound, other, force=True), CompressedCache)


def test_tensors_are_found_beside_the_recipe_and_checked(
    llama: Any, recipe_of: Any, tmp_path: Path
) -> None:
    artifact = tmp_path / "kvtune.safetensors"
    tensors = fits_of(recipe_of("klt-k2"), llama)
    ref = ArtifactRef(file=artifact.name, sha256=Artifact(tensors).save(artifact))
    recipe = recipe_of("klt-k2").model_copy(update={"artifact": ref})
    recipe.save(tmp_path / "recipe.toml")
    for place in (tmp_path, tmp_path / "recipe.toml", str(tmp_path)):
        site = load(place, llama).layers[0]._sites[0](torch.arange(2), torch.float32)
        assert site.tensors.keys() == {
            "klt.basis",
            "klt.inverse",
            "klt.mean",
            "waterfill.planes",
        }
        assert torch.equal(site.tensors["klt.basis"], tensors["layer.0.keys.klt.basis"])
    with pytest.raises(IntegrityError, match="by its path"):
        load(recipe, llama)
    data = artifact.read_bytes()
    artifact.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="changed"):
        load(tmp_path, llama)
    artifact.unlink()
    with pytest.raises(MissingInputError):
        load(tmp_path, llama)


def test_settings_that_do_not_fit_the_model_are_refused_before_anything_runs(
    llama: Any, recipe_of: Any
) -> None:
    wrong = {
        "layer 0, values: derope works on keys": {"values": ({"use": "derope"},)},
        "layer 0, keys: affine packs bytes": {
            "keys": ({"use": "affine", "group": "head"}, {"use": "derope"})
        },
        "layer 0, values: affine per token: group 128": {
            "values": ({"use": "affine", "group": 128},)
        },
    }
    for words, tier in wrong.items():
        entry = recipe_of(WINDOWED).layers[0]
        kept = entry.kept.model_copy(update={"keys": (), "values": (), **tier})
        recipe = Recipe(layers=(entry.model_copy(update={"kept": kept}),))
        with pytest.raises(UsageError, match=words):
            load(recipe, llama)


def test_a_template_cannot_be_loaded(llama: Any) -> None:
    text = 'kvtune = 1\n[[layers]]\nspan = "all"\nkept.keys = [{ use = "affine", bits = "search" }]'
    with pytest.raises(UsageError, match="template"):
        load(recipes.loads(text), llama)


def test_derope_is_refused_by_name_where_frequencies_change_with_the_length(
    model_of: Any, written: Any
) -> None:
    scaling = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM changes its rotary frequencies"):
        load(written(keys='use = "derope"'), model_of("llama", rope_parameters=scaling))


def test_a_model_without_full_attention_stays_as_it_is(
    model_of: Any, recipe_of: Any, draw: Any, play: Any
) -> None:
    model = model_of("mistral-sliding")
    cache, tokens = load(recipe_of("derope-k4"), model), draw(2, 70)
    assert cache.nbytes == 0
    dense = DynamicCache(config=model.config)
    expected = play(model, dense, tokens, [30, 1, 39])
    assert torch.equal(play(model, cache, tokens, [30, 1, 39]), expected)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in dense.layers]
