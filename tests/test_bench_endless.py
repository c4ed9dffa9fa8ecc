"""Laws of kvtune bench endless: stretches of what is read and said, and text beyond positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune.bench.endless import Watch, budgeted, held, read_on, say_on
from kvtune.cache import load
from kvtune.cli.generate import Prompt
from kvtune.cli.generate import _most as most
from kvtune.errors import UsageError
from kvtune.shipped import find

kv = TINY.kv
BOTH = ("lacache", "streaming-llm")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """A hundred tokens and one more [1, 101]."""
    return torch.randint(3, 60, (1, 101), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_a_stretch_is_that_of_its_tokens(llama: Any, ids: Tensor) -> None:
    found = read_on(llama, DynamicCache(config=llama.config), "own", ids, 40, 16)
    assert [(row.tokens, row.does, row.finite) for row in found] == [
        (40, "reads", True),
        (80, "reads", True),
        (100, "reads", True),
    ]
    with torch.no_grad():
        logp = llama(ids[:, :-1]).logits[0].log_softmax(-1)
    loss = -logp.gather(1, ids[0, 1:, None])[:, 0]
    for row, own in zip(found, loss.split([40, 40, 20]), strict=True):
        assert row.nll == pytest.approx(own.mean().item(), rel=1e-4)
    assert found[0].bytes < found[1].bytes < found[2].bytes


@pytest.mark.parametrize("name", BOTH)
def test_how_a_text_is_cut_makes_no_difference(llama: Any, ids: Tensor, name: str) -> None:
    """But for the first piece, which is a prompt."""
    recipe = budgeted(recipes.load(find(name)), 48)
    fresh = load(recipe, llama).fresh
    rows = [read_on(llama, fresh(), name, ids, 50, chunk) for chunk in (5, 10)]
    for one, two in zip(*rows, strict=True):
        assert one.nll == pytest.approx(two.nll, rel=1e-4)
    assert rows[0][-1].bytes < held(DynamicCache(config=llama.config)) + 100 * 4 * 2 * 2 * 64 * 4


def test_what_is_said_is_watched_token_by_token(llama: Any, ids: Tensor) -> None:
    cache = load(budgeted(recipes.load(find("lacache")), 48), llama)
    found = say_on(llama, cache, "lacache", ids[:, :10], 30, 20)
    assert [(row.tokens, row.does, row.nll) for row in found] == [
        (20, "says", None),
        (30, "says", None),
    ]
    assert cache.get_seq_length() == 10 + 30 - 1
    assert found[-1].bytes == cache.nbytes


def test_a_stretch_with_one_odd_logit_is_not_finite() -> None:
    watch = Watch("own", "says", DynamicCache(), torch.device("cpu"), 2)
    for odd in (False, False, True, False, False):
        watch.saw(1, torch.tensor(odd))
    watch.end()
    watch.end()
    assert [(row.tokens, row.finite) for row in watch.found] == [(2, True), (4, False), (5, True)]


def test_a_budget_replaces_share_and_budget_alike() -> None:
    text = 'kvtune = 1\n[[layers]]\nspan = "all"\nselect = { use = "ladder", share = 0.5 }\n'
    (entry,) = budgeted(recipes.loads(text), 99).layers
    assert entry.select == {"use": "ladder", "budget": 99}
    for odd in ("kvtune = 1\n", 'kvtune = 1\n[[layers]]\nspan = "all"\n'):
        with pytest.raises(UsageError, match="holds all tokens"):
            budgeted(recipes.loads(odd), 99)


def test_a_text_may_be_longer_than_the_positions_of_a_model(kv: Any, tmp_path: Path) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    count = TINY.POSITIONS + 200
    words = ["bench", "endless", model, "--data", prose, "--budget", "96", "--stretch", "600"]
    more = ["--tokens", count, "--generate", "40", "--dense", "-o", tmp_path / "rows.json"]
    found = kv.json(*words, *map(str, more))
    assert found["ok"], found["error"]
    assert found["data"]["positions"] == TINY.POSITIONS
    rows = found["data"]["rows"]
    assert [row["cache"] for row in rows] == [name for name in (*BOTH, "16 bits") for _ in range(4)]
    assert all(row["finite"] for row in rows)
    assert [row["tokens"] for row in rows[:4]] == [600, 1200, count, 40]
    for name in BOTH:
        own = [row["bytes"] for row in rows if row["cache"] == name and row["does"] == "reads"]
        assert max(own) < 1.2 * min(own), "a text takes no more as it goes on"
    assert rows[-2]["bytes"] > 4 * rows[2]["bytes"]
    assert (tmp_path / "rows.json").is_file()
    said = kv(*words, "--tokens", "100", "--recipes", "lacache")
    assert said.code == 0 and "lacache" in said.out


def test_a_recipe_that_holds_all_tokens_is_refused(kv: Any) -> None:
    said = kv("bench", "endless", "demo", "--recipes", "k4v2")
    assert said.code == 2
    assert "k4v2 holds all tokens of some layers" in said.told


def test_apply_generates_beyond_the_positions_of_a_model(llama: Any) -> None:
    """Where the cache has positions of its own; else prompt and new tokens share the model's."""
    positions, prompt = llama.config.max_position_embeddings, Prompt("so", False, 5)
    for name in BOTH:
        assert most(recipes.load(find(name)), llama, prompt) == positions
    for name in ("k4v2", "empty"):
        assert most(recipes.load(find(name)), llama, prompt) == positions - 5
    text = '[[layers]]\nspan = "all"\nselect = { use = "streaming", budget = 64 }\n'
    assert most(recipes.loads("kvtune = 1\n" + text), llama, prompt) == positions - 5
