"""Laws of the tables of the low-bit frontier: biased copies, equal bytes, rivals, verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune.bank import build
from kvtune.bench.compositions import FAMILIES, Row, choices, rows, spelled
from kvtune.bench.frontier import BAND, FEWEST, Frontier, rivals, within
from kvtune.biased import biased, slowest
from kvtune.cache import weigh
from kvtune.errors import UnsupportedError, UsageError
from kvtune.models import facts
from kvtune.policy import Policy

AT = 32768  # tokens at which bytes are counted


kv = TINY.kv


@pytest.fixture(scope="module")
def settled(model_of: Callable[..., Any]) -> list[Row]:
    """All compositions at the heads of a tiny Llama."""
    return rows(facts(model_of("llama").config), AT)


@pytest.fixture
def slow_llama(model_of: Callable[..., Any]) -> Any:
    """A tiny Llama whose slowest channels hardly turn, as in models of long contexts."""
    return model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e8})


def keys_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """The cached keys [B, H, T, D] of each layer."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    return [layer.keys for layer in cache.layers if isinstance(layer.keys, Tensor)]


@torch.no_grad()
def test_a_biased_copy_answers_alike_though_its_keys_are_large(slow_llama: Any, draw: Any) -> None:
    calibrated, tokens = draw(2, 96), draw(2, 96, seed=1)
    copy = biased(slow_llama, calibrated, factor=30.0)
    plain, loud = (model(tokens).logits.log_softmax(-1) for model in (slow_llama, copy))
    assert (plain.argmax(-1) == loud.argmax(-1)).float().mean() > 0.97
    first = slowest(slow_llama)[0]
    # the first layer sees the same inputs, so its keys differ by the bias alone
    before, after = keys_of(slow_llama, tokens)[0], keys_of(copy, tokens)[0]
    grown = (after - before)[..., first].norm(dim=-1) / before.std(-2).square().mean(-1).sqrt()[
        ..., None
    ]
    assert grown.min() > 24 and grown.max() < 38
    assert len(before) == 2 and slow_llama.model.layers[0].self_attn.k_proj.bias is None


@torch.no_grad()
def test_a_bias_adds_to_the_one_that_a_model_has(model_of: Any, draw: Any) -> None:
    model = model_of("qwen2")
    copy = biased(model, draw(1, 32))
    own = model.model.layers[1].self_attn.k_proj.bias
    changed = (copy.model.layers[1].self_attn.k_proj.bias - own).view(2, 32) != 0
    assert changed.sum(1).tolist() == [4, 4] and changed[:, slowest(model).flatten()].all()


@pytest.mark.parametrize("odd", ["phi3", "glm4", "qwen3"])
def test_a_model_whose_keys_take_no_bias_is_refused_by_name(
    model_of: Any, draw: Any, odd: str
) -> None:
    model = model_of(odd)
    with pytest.raises(UnsupportedError, match=type(model).__name__):
        biased(model, draw(1, 16))


def test_every_composition_is_legal_and_named_once(settled: list[Row]) -> None:
    names = [(row.family, row.without) for row in settled]
    assert len(set(names)) == len(names) == sum(1 + len(own.changes) for own in FAMILIES)
    for row in settled:
        row.policy.check(3, 64, 0)
        for chain, words in zip((row.policy.keys, row.policy.values), row.sides, strict=True):
            assert not words or list(choices(words)) == [chain]


def test_a_change_differs_from_its_whole_and_leaves_the_other_side_alone(
    settled: list[Row],
) -> None:
    whole = settled[0]
    for row in settled:
        if not row.without:
            whole = row
            continue
        assert row.policy != whole.policy
        sides = [(row.policy.keys, whole.policy.keys), (row.policy.values, whole.policy.values)]
        changed = [mine != theirs for mine, theirs in sides]
        if row.family == "both":
            wanted = {"keys": [True, False], "values": [False, True], "all": [True, True]}
            assert changed == wanted.get(row.without.partition(":")[0], [False, False])
        else:
            assert not all(changed)
            # a window is taken away from the very chains that had it
            assert any(changed) == row.same_window


def codecs_of(row: Row) -> list[str]:
    chain = row.policy.keys if row.policy.keys.codecs else row.policy.values
    return [codec.name() for codec in chain.codecs]


@pytest.mark.parametrize(
    ("family", "what", "left"),
    [
        ("keys", "klt", ["waterfill"]),
        ("keys", "klt, its mean kept", ["centre", "waterfill"]),
        ("keys", "waterfill", ["klt", "affine"]),
        ("keys", "post-RoPE", ["derope", "klt", "waterfill"]),
        ("values", "hadamard", ["normal"]),
        ("values", "normal", ["hadamard", "affine"]),
    ],
)
def test_a_removed_part_is_gone_and_the_others_stay(
    settled: list[Row], family: str, what: str, left: list[str]
) -> None:
    (row,) = (row for row in settled if (row.family, row.without) == (family, what))
    assert codecs_of(row) == left


def test_what_is_removed_is_never_missed_for_lack_of_bytes(settled: list[Row]) -> None:
    least = 0.0
    for row in settled:
        if not row.without:
            least = row.bits
        elif row.same_window:
            assert row.bits >= least, row
        assert row.bits < 3.5


@pytest.mark.parametrize("words", ["klt > waterfil", "affine bits=5", "affine bit=2"])
def test_a_composition_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"waterfil|bits|bit"):
        list(choices(words))


def test_open_settings_stand_for_all_that_are_legal() -> None:
    found = list(choices("affine bits=? group=32 axis=channel"))
    assert [spelled(chain) for chain in found] == [
        f"affine bits={bits} group=32 axis=channel" for bits in (2, 3, 4, 8)
    ]


def test_heads_that_no_composition_fits_are_refused(model_of: Any) -> None:
    with pytest.raises(UsageError, match="waterfill"):
        rows(facts(model_of("mistral", head_dim=20).config), AT)


def recipe_text(keys: str, values: str, recent: int = 64) -> str:
    sides = f"kept.keys = [{keys}]\nkept.values = [{values}]\n"
    return f'kvtune = 1\n[[layers]]\nspan = "all"\nsinks = 4\nrecent = {recent}\n{sides}'


CODES = ('{use = "affine", bits = 3, group = 64, axis = "channel"}', '{use = "hadamard"}')
NORMAL = '{use = "hadamard"}, {use = "normal", bits = 2}'


@pytest.fixture
def frontier(llama: Any, draw: Any) -> Iterator[Frontier]:
    """A tiny model's bank, and what is measured on it."""
    yield Frontier(llama, build(llama, draw(4, 329), 320), AT)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rivals_have_no_fewer_bytes_and_the_recipes_window(llama: Any, bits: int) -> None:
    known = facts(llama.config)
    keys, values = next(choices(f"affine bits={bits} group=64 axis=channel")), next(choices(NORM))
    own = Policy(sinks=4, recent=64, keys=keys, values=values)
    policies = (Policy(), own, own.model_copy(update={"recent": 96}), own)
    size = weigh(policies, known, AT).bytes
    every = rivals(policies, known, AT)
    assert [rival.bytes for rival in every] == sorted(rival.bytes for rival in every)
    near = within(every, size)
    assert len(near) >= FEWEST and all(rival.bytes >= size for rival in near)
    assert all(rival.bytes <= BAND * size for rival in near[FEWEST:])
    left_out = [rival for rival in every if size <= rival.bytes and rival not in near]
    assert all(rival.bytes >= near[-1].bytes for rival in left_out)
    for rival in near:
        windows = [(one.sinks, one.recent) for one in rival.policies]
        assert windows == [(4, 96), (4, 64), (4, 96), (4, 64)]
        assert len({(one.keys, one.values) for one in rival.policies}) == 1


NORM = "hadamard > normal bits=2 group=head"


def test_a_recipe_below_all_rivals_meets_the_cheapest(llama: Any) -> None:
    every = rivals((Policy(sinks=4, recent=64),) * 4, facts(llama.config), AT)
    assert within(every, 1) == every[:FEWEST]
    with pytest.raises(UsageError, match="more than any uniform KIVI recipe"):
        within(every, every[-1].bytes + 1)


def test_a_kivi_recipe_meets_itself(frontier: Frontier, tmp_path: Path) -> None:
    file = tmp_path / "kivi.toml"
    token = '{use = "affine", bits = 3, group = "head", axis = "token"}'
    file.write_text(recipe_text(CODES[0], token))
    point = frontier.point("kivi", file)
    assert point.ours.policies in {
        rival.policies
        for rival in within(rivals(point.ours.policies, frontier.bank.facts, AT), point.ours.bytes)
    }
    assert point.kivi.bytes >= point.ours.bytes
    assert point.kivi.kl <= point.ours.kl * (1 + 1e-9)
    assert point.is_short


def test_a_long_window_is_told(frontier: Frontier, tmp_path: Path) -> None:
    file = tmp_path / "long.toml"
    file.write_text(recipe_text(CODES[0], NORMAL, recent=160))
    point = frontier.point("long", file)
    assert not point.is_short and point.recent == 160


def test_bench_codecs_tells_both_models_side_by_side(
    kv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    words = (model, "--data", prose, *TINY.SMALL, "--bytes-context", "1k")
    found = kv.json("bench", "codecs", *words, "--biased", "-o", tmp_path / "found.json")
    assert found["ok"], found["error"]
    data = found["data"]
    assert set(data["perplexity"]) == {"model", "biased"}
    assert len(data["rows"]) == sum(1 + len(own.changes) for own in FAMILIES)
    for row in data["rows"]:
        assert set(row["measured"]) == {"model", "biased"}
        if not row["without"]:
            assert row["measured"]["model"]["ratio"] == pytest.approx(1)
    assert (tmp_path / "found.json").is_file()


def test_bench_frontier_sets_recipes_beside_kivi(kv: Any, tmp_path: Path) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    file = tmp_path / "own.toml"
    file.write_text(recipe_text(CODES[0], NORMAL, recent=160))
    words = ("--model", model, "--data", prose, "--context", "256", "--continuation", "16")
    sized = ("--positions", "60", "--bytes-context", "1k")
    found = kv.json("bench", "frontier", file, "k4v2", *words, *sized)
    assert found["ok"], found["error"]
    assert found["data"]["sequences"] == 4  # 60 positions in whole continuations
    points = found["data"]["points"]
    assert [point["recipe"] for point in points] == [str(file), "k4v2"]
    assert [point["short_window"] for point in points] == [False, True]
    assert any("160 recent tokens" in warning for warning in found["warnings"])
    for point in points:
        assert point["kivi"]["bytes"] >= point["bytes"]
        assert point["x"] == pytest.approx(point["kivi"]["kl"] / point["kl"])
    said = kv("bench", "frontier", file, *words, *sized)
    assert said.code == 0 and "160" in said.out and "160 recent tokens" in said.told
    assert kv("bench", "frontier", tmp_path / "none.toml", *words).code == 7


def test_a_fitted_recipe_is_measured_with_its_tensors(kv: Any, tmp_path: Path) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    text = ("--data", prose, "--context", "256", "--continuation", "16")
    run, file, fitted = tmp_path / "run", tmp_path / "klt.toml", tmp_path / "fitted"
    template = ("--template", "search-kivi", "--sequences", "2")
    assert kv("calibrate", model, *text, *template, "-o", run).code == 0
    file.write_text(
        recipe_text('{use = "klt"}, {use = "waterfill", bits = 4.0, group = 64}', NORMAL)
    )
    words = ("--model", model, *text, "--positions", "32", "--bytes-context", "1k")
    assert kv("bench", "frontier", file, *words).code == 4  # it lacks its tensors
    assert kv("fit", file, "--profile", run, "-o", fitted).code == 0
    (point,) = kv.json("bench", "frontier", fitted, *words)["data"]["points"]
    assert point["kl"] < 1 and point["kivi"]["bytes"] >= point["bytes"]


@pytest.mark.parametrize("verb", ["codecs", "frontier"])
def test_more_tokens_than_positions_are_refused(kv: Any, tmp_path: Path, verb: str) -> None:
    model = TINY.tiny(tmp_path / "model")
    named = ("k4v2", "--model", model) if verb == "frontier" else (model,)
    said = kv("bench", verb, *named, "--context", "4k")
    assert said.code == 2 and "exceed the model's 1,024 positions" in said.told
