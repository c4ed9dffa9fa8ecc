"""Laws of the bench of decoding: both caches are filled alike and judged by batch and speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from kvtune.bench import decode
from kvtune.bench.decode import COMPRESSED, DENSE, Decoding, Run, compare, verdict
from kvtune.errors import UnsupportedError
from kvtune.recipe import loads

CPU = torch.device("cpu")


@pytest.fixture
def small() -> Any:
    """A tiny Llama, made as the large one is."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
    )
    return decode.random_model(config, CPU, torch.float32)


def test_the_large_model_has_the_shape_of_llama_8b() -> None:
    with torch.device("meta"):
        model = decode.random_model(decode.llama_8b(), torch.device("meta"))
    assert sum(weight.numel() for weight in model.parameters()) == 8_030_261_248
    assert model.dtype == torch.bfloat16 and not model.training


def test_decoding_goes_on_behind_the_filled_context_one_token_at_a_time(small: Any) -> None:
    seen: list[tuple[int, ...]] = []
    small.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    decoding = Decoding(small, decode.usual_recipe(), 300, 3)
    runs = compare(decoding, [1, 2], lambda *words: None)
    assert [(run.batch, run.cache) for run in runs] == [
        (1, DENSE),
        (1, COMPRESSED),
        (2, DENSE),
        (2, COMPRESSED),
    ]
    assert set(seen) == {(1, 1), (2, 1)}
    assert len(seen) == 4 * (decode.WARM + decode.REPEATS * 3)
    assert all(run.tokens_per_second > 0 and run.peak_bytes is None for run in runs)
    assert small.config._attn_implementation == "sdpa"
    assert runs[0].cache_bytes == 2 * 4 * 64 * 300 * 2 > runs[1].cache_bytes


def test_both_caches_hold_the_context_and_take_the_steps(small: Any) -> None:
    decoding = Decoding(small, decode.usual_recipe(), 300, 3)
    for kind in (COMPRESSED, DENSE):
        cache = decoding._filled(kind, 2)
        assert cache.get_seq_length() == 300
        tokens = decoding._generated(torch.full((2, 301), 11), cache, 5)
        assert tokens.shape == (2, 306) and cache.get_seq_length() == 305
    assert cache.layers[1].keys.shape == (2, 1, 305, 64)


SELECTING = """kvtune = 1
name = "selecting"
[[layers]]
span = "all"
sinks = 4
recent = 60
select = { use = "NAME", budget = 128 }
"""


@pytest.mark.parametrize("name", ["snapkv", "attention", "knorm", "kvzip", "tova"])
def test_a_recipe_that_selects_tokens_decodes_behind_what_it_keeps(small: Any, name: str) -> None:
    recipe = loads(SELECTING.replace("NAME", name), name)
    decoding = Decoding(small, recipe, 300, 3)
    cache = decoding._filled(COMPRESSED, 2)
    held = [layer.groups[0].rows for layer in cache.layers]
    assert [rows.read(torch.float32)[0].shape[2] for rows in held] == [128, 128]
    tokens = decoding._generated(torch.full((2, 301), 11), cache, 5)
    assert tokens.shape == (2, 306) and cache.get_seq_length() == 305
    assert decoding._row[COMPRESSED] < decoding._row[DENSE] / 2


def test_a_selector_that_reads_the_text_is_refused(small: Any) -> None:
    recipe = loads(SELECTING.replace("NAME", "draft"), "draft")
    with pytest.raises(UnsupportedError, match="needs ahead, which a random context does not have"):
        Decoding(small, recipe, 300, 3)._filled(COMPRESSED, 1)


def run(kind: str, batch: int, rate: float, largest: bool = False) -> Run:
    return Run(kind, largest, batch, 32768, 32, rate, None, 1)


def test_decoding_is_judged_by_batch_and_speed() -> None:
    runs = [run(DENSE, 1, 40.0), run(COMPRESSED, 1, 44.0)]
    assert verdict(runs)["ratios"] == {"speed_ratio_one": pytest.approx(1.1)}
    runs += [run(DENSE, 14, 200.0, True), run(COMPRESSED, 44, 480.0, True)]
    found = verdict(runs)
    assert found["ratios"]["batch_ratio"] == pytest.approx(44 / 14)
    met = {goal["what"]: goal["met"] for goal in found["goals"]}
    assert met == {"batch_ratio": True, "speed_ratio_largest": False, "speed_ratio_one": True}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=lambda error: type(error).__name__,
)
def test_the_largest_batch_is_the_first_that_does_not_run_out(
    small: Any, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    decoding = Decoding(small, decode.usual_recipe(), 300, 3)
    room = 7 * decoding._row[COMPRESSED]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, room))
    tried = []

    def fits(kind: str, batch: int, largest: bool = False) -> Run:
        tried.append(batch)
        if batch > 5:
            raise error
        return run(kind, batch, 1.0, largest)

    monkeypatch.setattr(decoding, "run", fits)
    assert decoding.largest(COMPRESSED) == run(COMPRESSED, 5, 1.0, True)
    assert tried == [7, 6, 5]


def test_an_error_other_than_memory_is_not_taken_for_it(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(small, decode.usual_recipe(), 300, 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 20))

    def broken(*args: Any, **kwargs: Any) -> Run:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(decoding, "run", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        decoding.largest(DENSE)
