"""Laws of kvtune/models.py: which models are served, what shapes their cache, who they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JambaConfig,
    LlamaConfig,
    T5Config,
    WhisperConfig,
)

from kvtune.cache import load
from kvtune.errors import MissingInputError, UnsupportedError, UsageError
from kvtune.models import (
    facts,
    fingerprint,
    label,
    load_model,
    pick_device,
    pick_dtype,
    ropes,
)

SHAPES = {  # kv heads, query heads, head_dim, compressible layers
    "llama": (2, 4, 64, (0, 1, 2, 3)),
    "yi": (1, 7, 16, (0, 1)),
    "mistral": (2, 6, 16, (0, 1)),
    "mistral-sliding": (2, 4, 16, ()),
    "qwen2": (2, 4, 32, (0, 1)),
    "qwen3": (2, 4, 24, (0, 1)),
    "phi3": (2, 4, 16, (0, 1)),
    "gemma2": (2, 4, 16, (1,)),
    "gemma3": (1, 4, 16, (1,)),
    "glm4": (2, 4, 16, (0, 1)),
}


def test_facts_are_those_of_the_cache(name: str, model: Any, draw: Any) -> None:
    known = facts(model.config)
    kv_heads, query_heads, dim, full = SHAPES[name]
    assert known.compressible() == full
    out = model(draw(1, 40), use_cache=True).past_key_values
    for layer, held in zip(known.layers, out.layers, strict=True):
        assert (layer.kv_heads, layer.head_dim) == (kv_heads, dim)
        assert layer.query_heads == query_heads
        assert held.keys.shape[1::2] == (kv_heads, dim)
        assert held.keys.shape[2] == (40 if layer.window is None else layer.window - 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BertConfig(), "bert.*encoder-only"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM.*encoder-only"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "no causal language model"),
        (T5Config(), "t5 is an encoder-decoder"),
        (WhisperConfig(), "whisper is an encoder-decoder"),
        (DeepseekV3Config(), r"deepseek_v3 .*\(MLA\)"),
        (JambaConfig(), "jamba has .* layers"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_without_a_plain_kv_cache_are_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        facts(config)
    assert caught.value.exit_code == 5


def test_every_tiny_model_has_its_rope(name: str, model: Any) -> None:
    full = facts(model.config).compressible()
    found = ropes(model)
    assert tuple(found) == full
    for rope in found.values():
        assert rope.interleaved == (name == "glm4")
        assert rope.layer_type == ("full_attention" if name == "gemma3" else None)
        positions = torch.tensor([0, 3, 1000])
        x = torch.randn(1, 2, 3, SHAPES[name][2], dtype=torch.float64)
        turned = rope.turn(x, positions)
        torch.testing.assert_close(rope.unturn(turned, positions), x, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(turned[:, :, 0], x[:, :, 0], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(turned[:, :, 1], x[:, :, 1], atol=1e-2)


def test_a_partial_rotary_turns_only_its_part(model_of: Any) -> None:
    rope = ropes(model_of("glm4"))[0]
    x = torch.randn(1, 1, 4, 16)
    turned = rope.turn(x, torch.arange(10, 14))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.allclose(turned[..., :8], x[..., :8], atol=1e-2)


def test_a_fused_model_with_heads_of_its_own_kind_is_served(
    written: Any, play: Any, draw: Any
) -> None:
    """GPT-NeoX: each head is a kv head, a quarter turns, and it says that it is no decoder."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 61}
    torch.manual_seed(0)
    config = GPTNeoXConfig(num_attention_heads=2, rotary_pct=0.25, initializer_range=0.3, **sizes)
    for heads in (None, ["GPTNeoXForCausalLM"]):
        config.architectures = heads
        assert facts(config).layers[0].kv_heads == 2
    model = GPTNeoXForCausalLM(config).double().eval().requires_grad_(False)
    tokens = draw(2, 90)
    dense = play(model, DynamicCache(config=config), tokens, [50, *[1] * 40])
    cache = load(written(keys='use = "derope"', recent=3), model)
    found = play(model, cache, tokens, [50, *[1] * 40])
    torch.testing.assert_close(found, dense, atol=1e-9, rtol=1e-9)
    assert cache.layers[0].groups[0].rows.keys.tokens == 87


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_have_no_rope(model_of: Any, kind: str) -> None:
    scaling: dict[str, Any] = {"rope_theta": 1e4, "rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        factors = {"long_factor": [2.0] * 32, "short_factor": [1.0] * 32}
        scaling |= {**factors, "original_max_position_embeddings": 2048}
    with pytest.raises(UnsupportedError, match="changes its rotary frequencies"):
        ropes(model_of("llama", rope_parameters=scaling))


@pytest.fixture
def learned() -> GPT2LMHeadModel:
    """A model with learned positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).double().eval().requires_grad_(False)


def test_a_model_with_learned_positions_has_no_rope_but_a_cache(
    learned: Any, recipe_of: Any, written: Any, play: Any, draw: Any
) -> None:
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has no rotary embedding"):
        load(written(keys='use = "derope"'), learned)
    recipe, tokens = recipe_of("k8v8"), draw(2, 120)
    whole = play(learned, load(recipe, learned), tokens, [50, 70])
    steps = play(learned, load(recipe, learned), tokens, [50, *[1] * 70])
    torch.testing.assert_close(whole, steps, atol=1e-9, rtol=1e-9)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_dtype(name: str, model_of: Any) -> None:
    model = model_of(name).to(torch.bfloat16)
    half = fingerprint(model)
    assert half == fingerprint(model.to(torch.float32))
    assert half == fingerprint(model_of(name).to(torch.bfloat16))
    assert half.startswith("sha256:") and len(half) == 71
    assert half != fingerprint(model_of(name, seed=1).to(torch.bfloat16))


def test_a_saved_model_is_the_same_model(name: str, model_of: Any, tmp_path: Path) -> None:
    model = model_of(name).float()
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(model) == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint(again) == before


def kv_weights(model: Any) -> list[str]:
    """Returns the names of the weights that keys and values are made with."""
    found = ("k_proj", "v_proj", "qkv_proj", "c_attn", "k_norm")
    return [name for name, _ in model.named_parameters() if any(part in name for part in found)]


def test_every_weight_of_keys_and_values_counts(name: str, model_of: Any) -> None:
    model = model_of(name)
    before, weights = fingerprint(model), dict(model.named_parameters())
    assert kv_weights(model)
    for label_ in kv_weights(model):
        flat = weights[label_].view(-1)
        flat[-1] += 1
        assert fingerprint(model) != before, label_
        flat[-1] -= 1


def test_a_fingerprint_never_goes_without_weights(learned: Any) -> None:
    before = fingerprint(learned)
    learned.transformer.h[1].attn.c_attn.weight[0, 40] += 1
    assert fingerprint(learned) != before
    for block in learned.transformer.h:
        block.attn.renamed = block.attn.c_attn
        del block.attn.c_attn
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel names its key and value weights"):
        fingerprint(learned)


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5e5}, {"num_attention_heads": 8}, {"vocab_size": 67}], ids=str
)
def test_a_fingerprint_is_of_the_shape_of_the_cache(model_of: Any, change: dict[str, Any]) -> None:
    own = model_of("llama")
    other = model_of("llama", **change)
    for name, weight in own.named_parameters():
        if name in kv_weights(own):
            other.get_parameter(name).data = weight
    assert fingerprint(other) != fingerprint(own)


def test_a_place_and_a_dtype_are_picked_by_name() -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", cpu) == torch.float16
    with pytest.raises(UsageError, match="Did you mean 'float32'"):
        pick_dtype("float23", cpu)
    with pytest.raises(UsageError, match=r"no device 'cpuu'. Did you mean 'cpu'"):
        pick_device("cpuu")


def test_a_local_model_is_loaded_ready_to_run(tmp_path: Path, model_of: Any) -> None:
    model = model_of("llama").float()
    folder = tmp_path / "my-model"
    model.save_pretrained(folder)
    with pytest.raises(MissingInputError, match="my-model' cannot be loaded"):
        load_model(str(folder), offline=True)  # it has no tokenizer
    assert label(str(folder)) == "my-model"
    assert label("somebody/model") == "somebody/model"


@pytest.mark.parametrize("name", ["dem", "somebody/nothing-that-exists"])
def test_a_model_that_is_not_there_is_a_missing_input(name: str) -> None:
    with pytest.raises(MissingInputError, match=f"{name}' cannot be loaded") as caught:
        load_model(name, offline=True)
    assert caught.value.exit_code == 7


def test_the_demo_model_speaks_the_same_words_under_8_bits(
    demo: tuple[Any, Any], recipe_of: Any, written: Any
) -> None:
    model, tokenizer = demo
    known = facts(model.config)
    assert (len(known.layers), known.layers[0].kv_heads, known.layers[0].head_dim) == (30, 3, 64)
    prompt = "The three primary colours are red, blue and yellow. " * 6 + "Water boils at"
    tokens = tokenizer(prompt, return_tensors="pt")
    said = []
    for recipe in (written(), recipe_of("k8v8")):
        cache = load(recipe, model)
        out = model.generate(**tokens, past_key_values=cache, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(out[0]))
    assert said[0] == said[1]
    assert said[0].startswith(prompt)
