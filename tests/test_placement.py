"""Laws of kvtune/placement.py: a model that accelerate spreads stays the same model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from kvtune import prices
from kvtune.bank import Bank, build
from kvtune.cache import load
from kvtune.calibrate import find_ropes
from kvtune.errors import UsageError
from kvtune.measure import Bench
from kvtune.models import fingerprint, load_model, places
from kvtune.moments import Moments, attention_mass
from kvtune.placement import DEVICE_MAPS, device_of, input_device
from kvtune.prove import by_generation
from kvtune.recipe import Recipe

CPU = torch.device("cpu")
CONTEXT = 160
RECIPE = "k4v2-windowed"


def offloaded(model: Any, folder: Path) -> Any:
    """All weights wait off the model, which then holds "meta" tensors alone."""
    return cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> Any:
    """Every second layer waits on disk, all else is on the CPU."""
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {"model.rotary_emb": "cpu"}
    count = model.config.num_hidden_layers
    parts |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(count)}
    return dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder))


@pytest.fixture(params=[offloaded, on_disk], ids=lambda make: make.__name__)
def spread(request: pytest.FixtureRequest, model_of: Any, tmp_path: Path) -> Any:
    """A tiny Llama that accelerate spreads."""
    return request.param(model_of("llama"), tmp_path)


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 61, (2, CONTEXT + 25), generator=generator)


def pair(model: Any, tokens: torch.Tensor) -> tuple[Bank, Moments]:
    moments = Moments(find_ropes(model))
    return build(model, tokens, CONTEXT, observe=moments.observe), moments


def test_a_spread_model_is_on_the_devices_that_compute(spread: Any) -> None:
    assert any(weight.device.type == "meta" for weight in spread.parameters())
    assert input_device(spread) == CPU
    assert places(spread) == dict.fromkeys(range(4), CPU)
    assert all(device_of(layer.mlp.up_proj) == CPU for layer in spread.model.layers)


def test_a_spread_model_has_the_fingerprint_of_the_whole_one(spread: Any, llama: Any) -> None:
    assert fingerprint(spread) == fingerprint(llama)
    assert fingerprint(spread) == fingerprint(llama), "reading weights leaves them where they were"
    assert any(weight.device.type == "meta" for weight in spread.parameters())


def test_a_spread_model_measures_what_the_whole_one_does(
    spread: Any, llama: Any, recipe_of: Any, tokens: torch.Tensor
) -> None:
    recipe: Recipe = recipe_of(RECIPE)
    found = []
    for model in (spread, llama):
        bank, moments = pair(model, tokens)
        bench = Bench(model, bank, find_ropes(model))
        policies = recipe.policies(bank.facts)
        cells = [(layer, policy) for layer, policy in enumerate(policies)]
        priced = prices.table(bench, cells, prices.pulls(model, bank, 0), lambda *_: None)
        trial = bench.measure(policies)
        proof = by_generation(model, load(recipe, model), bank, 8)
        own = {**moments.tensors(CONTEXT), **attention_mass(bank)}
        found.append(
            {"bank": bank.logp, "prices": priced, "kl": trial.kl, "proof": proof.kl, **own}
        )
    for name, tensor in found[0].items():
        assert tensor.device == CPU
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_spread_model_says_the_same_words(spread: Any, llama: Any, recipe_of: Any) -> None:
    prompt = torch.arange(2, 50)[None]
    said = [
        model.generate(
            prompt,
            past_key_values=load(recipe_of(RECIPE), model),
            max_new_tokens=40,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
        for model in (spread, llama)
    ]
    assert torch.equal(*said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    file = Path(__file__).with_name("cli_tiny.py")
    spec = importlib.util.spec_from_file_location("cli_tiny", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.tiny(tmp_path_factory.mktemp("saved"))
    return folder


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_every_device_map_loads_the_same_model(saved: Path, device_map: str) -> None:
    plain, _ = load_model(str(saved), device="cpu", dtype="float32", offline=True)
    spread, _ = load_model(str(saved), dtype="float32", offline=True, device_map=device_map)
    assert fingerprint(spread) == fingerprint(plain)
    assert not spread.training and not any(x.requires_grad for x in spread.parameters())
    prompt = torch.arange(3, 40)[None]
    with torch.no_grad():
        out = spread(prompt.to(input_device(spread))).logits
        torch.testing.assert_close(out.cpu(), plain(prompt).logits, rtol=1e-4, atol=1e-4)


def test_a_wrong_device_map_and_a_device_beside_it_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"no device map 'autoo'. Did you mean 'auto'"):
        load_model(str(saved), offline=True, device_map="autoo")
    with pytest.raises(UsageError, match="--device cpu is one device"):
        load_model(str(saved), device="cpu", offline=True, device_map="auto")
