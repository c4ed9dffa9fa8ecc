"""Laws of the bank: a trial on it measures what generation step by step gives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune.bank import build
from kvtune.cache import load
from kvtune.errors import ResourceError, UsageError
from kvtune.measure import Bench
from kvtune.models import facts, ropes
from kvtune.prove import by_generation, interval
from kvtune.recipe import Policy
from kvtune.rows import Side

CONTEXT, MORE = 150, 40
LAWFUL = (
    *("k8v8", "k4v2-windowed", "k2v4-bare", "derope-k4", "layers-apart", "first-dense"),
    *("heads-apart", "hadamard-k4"),
)


@pytest.fixture
def bench(model: Any, draw: Any) -> Bench:
    """Two sequences of a model."""
    bank = build(model, draw(2, CONTEXT + MORE + 1), CONTEXT)
    return Bench(model, bank, ropes(model) if facts(model.config).compressible() else {})


def test_the_bank_holds_what_the_dense_model_does(model: Any, draw: Any) -> None:
    tokens = draw(2, CONTEXT + MORE + 1)
    bank = build(model, tokens, CONTEXT)
    cache = DynamicCache(config=model.config)
    logits = model(tokens[:, :-1], past_key_values=cache).logits[:, CONTEXT:]
    torch.testing.assert_close(bank.logp, logits.float().log_softmax(-1), atol=1e-5, rtol=1e-5)
    for layer in bank.keys:
        torch.testing.assert_close(bank.keys[layer], cache.layers[layer].keys[:, :, :CONTEXT])
        torch.testing.assert_close(bank.values[layer], cache.layers[layer].values[:, :, :CONTEXT])


def test_a_trial_without_compression_measures_nothing(bench: Bench) -> None:
    quality = bench.measure((Policy(),) * len(bench.bank.facts.layers))
    assert quality.kl.abs().max() < 1e-6
    assert quality.flips.sum() == 0


@pytest.mark.parametrize("recipe_name", LAWFUL)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "phi3"])
def test_bank_measurement_equals_generation(
    model: Any, bench: Bench, recipe_of: Any, recipe_name: str
) -> None:
    recipe = recipe_of(recipe_name)
    policies = recipe.policies(facts(model.config))
    measured = bench.measure(policies)
    generated = by_generation(model, load(recipe, model), bench.bank, MORE)
    went_on = by_generation(model, bench.cache(policies), bench.bank, MORE)
    torch.testing.assert_close(went_on.kl, generated.kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(measured.kl, generated.kl, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(measured.dnll, generated.dnll, atol=1e-5, rtol=1e-3)
    assert torch.equal(measured.flips, generated.flips)


def test_a_trial_leaves_the_bank_and_the_memo_as_they_were(
    llama: Any, draw: Any, recipe_of: Any
) -> None:
    bench = Bench(llama, build(llama, draw(2, CONTEXT + MORE + 1), CONTEXT))
    policies = recipe_of("k4v2-windowed").policies(facts(llama.config))
    first = bench.measure(policies)
    assert torch.equal(first.kl, bench.measure(policies).kl)
    assert torch.equal(first.kl, bench.measure(policies, memo=False).kl)


@pytest.mark.parametrize("recipe_name", LAWFUL)
def test_what_the_memo_assembles_is_what_a_fill_leaves(
    llama: Any, draw: Any, recipe_of: Any, recipe_name: str
) -> None:
    """Also when each side was memoised by another trial."""
    bench = Bench(llama, build(llama, draw(2, CONTEXT + MORE + 1), CONTEXT), ropes(llama))
    policies = recipe_of(recipe_name).policies(facts(llama.config))
    plain = bench.measure(policies, memo=False)
    swapped = tuple(
        own
        if own.heads or "rope" in own.keys.needs
        else own.model_copy(update={"values": own.keys})
        for own in policies
    )
    bench.measure(swapped)
    for _ in range(2):
        found = bench.measure(policies)
        assert torch.equal(found.kl, plain.kl)
        assert torch.equal(found.dnll, plain.dnll)


def test_a_change_of_one_side_encodes_that_side_alone(
    llama: Any, draw: Any, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(llama, build(llama, draw(2, CONTEXT + MORE + 1), CONTEXT))
    one = recipe_of("k2v4-bare").policies(facts(llama.config))
    keys, values = one[0].keys, one[0].values
    bench.measure(one)
    encoded: list[str] = []
    encode = type(keys.codecs[0]).encode

    def counting(self: Any, x: Tensor, site: Any) -> Any:
        encoded.append(site.side)
        return encode(self, x, site)

    monkeypatch.setattr(type(keys.codecs[0]), "encode", counting)
    bench.measure(one)
    assert encoded == []
    bench.measure(tuple(own.model_copy(update={"values": keys}) for own in one))
    assert encoded == ["values"] * len(one)
    bench.measure(tuple(own.model_copy(update={"keys": values}) for own in one))
    assert encoded == ["values"] * len(one) + ["keys"] * len(one)


def test_the_memo_stays_within_its_bytes(
    llama: Any, draw: Any, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(llama, build(llama, draw(2, CONTEXT + MORE + 1), CONTEXT))
    monkeypatch.setattr("kvtune.measure.MEMO_BYTES", 100_000)
    most = 0
    for name in ("k8v8", "k2v4-bare", "k3-only", "heads-apart"):
        bench = Bench(llama, bench.bank, ropes(llama))
        bench.measure(recipe_of(name).policies(facts(llama.config)))
        held = sum(
            item.nbytes if isinstance(item, Side) else sum(item.nbytes)
            for item in bench._memo.values()
        )
        most = max(most, held)
        assert held == bench._held <= 100_000 or len(bench._memo) == 1
    assert most > 0


def test_out_of_memory_halves_the_batch_and_then_is_an_answer(
    llama: Any, draw: Any, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(llama, build(llama, draw(4, CONTEXT + MORE + 1), CONTEXT))
    policies = recipe_of("first-dense").policies(facts(llama.config))
    whole = bench.measure(policies)
    forward = llama.forward

    def small(most: int) -> Any:
        def run(inputs: Tensor, **given: Any) -> Any:
            if inputs.shape[0] > most:
                raise torch.OutOfMemoryError("no more")
            return forward(inputs, **given)

        return run

    monkeypatch.setattr(llama, "forward", small(1))
    torch.testing.assert_close(bench.measure(policies).kl, whole.kl, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(llama, "forward", small(0))
    with pytest.raises(ResourceError, match="does not fit into memory"):
        bench.measure(policies)


def test_a_context_beyond_the_positions_is_refused(llama: Any, draw: Any) -> None:
    with pytest.raises(UsageError, match="4096 positions"):
        build(llama, draw(1, 4200), 4100)


def test_the_interval_holds_the_mean_and_narrows_with_agreement() -> None:
    values = torch.rand(8, 30, generator=torch.Generator().manual_seed(0))
    low, high = interval(values)
    assert low < float(values.mean()) < high
    assert interval(values) == (low, high)
    spread = values + torch.arange(8)[:, None]
    assert interval(spread)[1] - interval(spread)[0] > high - low
