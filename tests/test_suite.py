"""Laws of the suite: both sides see the same, runs repeat, and statistics claim only what is so."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtune import recipe as recipes
from kvtune import suite
from kvtune.answers import answers
from kvtune.cache import load
from kvtune.errors import UsageError
from kvtune.intervals import items_needed, resampled
from kvtune.models import load_model
from kvtune.scores import Scores, TaskScores
from kvtune.task import Item, Turn


def load_tiny() -> ModuleType:
    file = Path(__file__).with_name("cli_tiny.py")
    spec = importlib.util.spec_from_file_location("cli_tiny", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = load_tiny()
kv, tiny = TINY.kv, TINY.tiny
WEAK = """
kvtune = 1
name = "weak"
[[layers]]
span = "all"
kept.keys = [{ use = "affine", bits = 2, group = "head", axis = "token" }]
kept.values = [{ use = "affine", bits = 2, group = "head", axis = "token" }]
"""
EMPTY = 'kvtune = 1\nname = "empty"\n[[layers]]\nspan = "all"\n'
PROSE = "A road leads north. It rains often there. Few people know the way. " * 40


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(tiny(tmp_path_factory.mktemp("model"))), offline=True)


def items(count: int) -> list[Item]:
    rng = random.Random(0)
    said = ("the", "quick", "brown", "fox", "jumps", "over", "it", "and", "runs", "on")
    return [
        Item(
            " ".join(rng.choices(said, k=60 + 7 * place)),
            (Turn(" what then", ("fox",), 5), Turn(f" and {'now' * (place % 2 + 1)}", ("it",), 6)),
            ("it", "fox"),
        )
        for place in range(count)
    ]


def asked(small: tuple[Any, Any], text: str, count: int = 5) -> dict[int, Any]:
    model, tokenizer = small
    return dict(answers(model, tokenizer, items(count), load(recipes.loads(text), model)))


def test_an_empty_recipe_answers_as_the_dense_model(small: tuple[Any, Any]) -> None:
    found = asked(small, EMPTY)
    assert sorted(found) == list(range(5))
    assert all(pair.dense == pair.compressed for pair in found.values())


def test_two_bits_change_answers_but_never_the_dense_ones(small: tuple[Any, Any]) -> None:
    weak, empty = asked(small, WEAK), asked(small, EMPTY)
    assert all(weak[place].dense == empty[place].dense for place in weak)
    assert any(pair.dense != pair.compressed for pair in weak.values())


@torch.no_grad()
@pytest.mark.parametrize("text", [EMPTY, WEAK])
def test_a_batched_answer_is_that_of_the_item_alone(small: tuple[Any, Any], text: str) -> None:
    """Also the reference: context, then each question whole, then token by token."""
    model, tokenizer = small
    together = asked(small, text)
    for place, item in enumerate(items(5)):
        cache = load(recipes.loads(text), model)
        for found, wanted in ((DynamicCache(config=model.config), "dense"), (cache, "compressed")):
            ids = tokenizer(item.context, return_tensors="pt").input_ids
            model(ids, past_key_values=found)
            last: list[int] = []
            for turn in item.turns:
                more = tokenizer(turn.question, add_special_tokens=False).input_ids
                # the last token said was not read yet
                logits = model(torch.tensor([[*last[-1:], *more]]), past_key_values=found).logits
                last = [int(logits[0, -1].argmax())]
                while len(last) < turn.new_tokens:
                    logits = model(torch.tensor([last[-1:]]), past_key_values=found).logits
                    last.append(int(logits[0, -1].argmax()))
            end = tokenizer.eos_token_id
            kept = last[: last.index(end)] if end in last else last
            said = tokenizer.decode(kept, skip_special_tokens=True)
            assert getattr(together[place], wanted) == said


@pytest.fixture
def ending(small: tuple[Any, Any]) -> Iterator[tuple[Any, list[int]]]:
    """The model's own generation config, and tokens that its answers hold."""
    model, tokenizer = small
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    said = [pair.dense for pair in asked(small, EMPTY).values()]
    yield model.generation_config, [tokenizer(text).input_ids[1] for text in said[:2]]
    model.generation_config = own


@pytest.mark.parametrize("text", [EMPTY, WEAK])
def test_an_answer_ends_at_any_end_of_the_model_whatever_its_neighbours_do(
    small: tuple[Any, Any], ending: tuple[Any, list[int]], text: str
) -> None:
    model, tokenizer = small
    cache, config = load(recipes.loads(text), model), ending[0]
    short = [replace(item, turns=item.turns[-1:]) for item in items(5)]
    whole = dict(answers(model, tokenizer, short, cache))
    config.eos_token_id = ending[1]
    cut = dict(answers(model, tokenizer, short, cache))
    for place in whole:
        assert all(a.startswith(b) for a, b in zip(whole[place], cut[place], strict=True))
    assert whole != cut
    together = asked(small, text)
    for place, item in enumerate(items(5)):
        assert dict(answers(model, tokenizer, [item], cache))[0] == together[place]


def test_a_penalty_that_a_model_ships_does_not_forbid_to_repeat_the_context(
    small: tuple[Any, Any], ending: tuple[Any, list[int]]
) -> None:
    free = asked(small, WEAK)
    ending[0].repetition_penalty, ending[0].no_repeat_ngram_size = 9.0, 1
    assert asked(small, WEAK) == free


def test_runs_agree_exactly_and_fewer_items_are_the_first_of_more(small: tuple[Any, Any]) -> None:
    def run(count: int) -> dict[str, Any]:
        return suite.run(
            *small, recipes.loads(WEAK), "cwe,long", items=count, length=800, data=PROSE
        ).table()

    assert run(3) == run(3)
    assert set(run(3)["tasks"]) == {"cwe", "long"}


def test_long_generation_agrees_with_itself_and_stays_out_of_the_mean(
    small: tuple[Any, Any],
) -> None:
    scores = suite.run(*small, recipes.loads(EMPTY), ["long"], items=2, length=600, data=PROSE)
    table = scores.table()
    assert table["tasks"]["long"]["compressed"]["score"] == 1.0
    assert set(table["tasks"]["long"]["details"]) == {"words", "repetition"}
    assert table["mean"] is None


def test_a_model_at_chance_is_said_to_be_and_not_averaged(small: tuple[Any, Any]) -> None:
    found = suite.run(*small, recipes.loads(WEAK), "fwe", items=4, length=700).table()
    assert found["tasks"]["fwe"]["at_chance"]
    assert found["tasks"]["fwe"]["verdict"] == "cannot tell"
    assert found["mean"] is None


def test_the_length_found_is_the_longest_at_which_dense_works(
    small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = suite.Asking(*small, 0, PROSE, lambda *_: None)
    tried = []

    def scored(task: Any, length: int, count: int, cache: Any) -> TaskScores:
        tried.append(length)
        right = float(length <= 1024)
        return TaskScores(task.name(), 0.01, (right,) * count, (right,) * count)

    monkeypatch.setattr(asking, "scored", scored)
    wanted = [suite.tasks.find(name) for name in ("passkey", "needle")]
    assert asking.working_length(wanted, 4096) == 1024
    assert tried == [4096, 4096, 2048, 2048, 1024, 1024]


def test_a_task_that_does_not_fit_is_named(small: tuple[Any, Any]) -> None:
    found = suite.run(*small, recipes.loads(WEAK), "passkey,cwe", items=2, length=220)
    assert found.too_long == ("cwe",)
    with pytest.raises(UsageError, match="--suite-length"):
        suite.run(*small, recipes.loads(WEAK), "long", items=2, length=64)


@pytest.mark.parametrize("wrong", ["paskey", "quick,full", ""])
def test_an_unknown_name_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="no task"):
        suite.chosen(wrong)


def test_every_task_is_in_the_full_suite_and_some_in_the_quick_one() -> None:
    assert suite.chosen("full") == suite.tasks.names()
    assert 3 <= len(suite.chosen("quick")) < len(suite.chosen("full"))


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held, rounds = random.Random(0), 0, 200
    for _ in range(rounds):
        drawn = [float(rng.random() < 0.7) for _ in range(30)]
        _, low, high = resampled([drawn], (0.0, 1.0))
        held += low <= 0.7 <= high
    assert held / rounds > 0.88


def test_a_drop_in_very_few_items_is_no_conclusion() -> None:
    fallen = (0.0, 0.0, 0.0, 0.5, 0.0, 0.0)
    few, more = (TaskScores("t", 0.0, (1.0,) * n, fallen[:n]).table() for n in (5, 6))
    assert few["verdict"] == "cannot tell"
    assert few["needs"] >= 6
    assert more["verdict"] == "worse"


def test_no_difference_in_few_items_promises_little() -> None:
    few, many = (TaskScores("t", 0.0, (1.0,) * n, (1.0,) * n).table() for n in (5, 40))
    assert few["verdict"] == "cannot tell"
    assert few["needs"] == items_needed([0.0] * 5, 0.1) == 30
    assert many["verdict"] == "no worse than 7.5%"


def test_a_clear_drop_is_worse_and_pairs_are_what_is_resampled() -> None:
    dense = tuple(float(i % 2) for i in range(30))
    worse = TaskScores("t", 0.0, (1.0,) * 30, dense).table()
    assert worse["verdict"] == "worse"
    same = TaskScores("t", 0.0, dense, dense)
    assert same.difference.low == -0.1  # however spread the scores, the pairs do not differ


def test_tasks_at_chance_do_not_move_the_mean() -> None:
    good = TaskScores("good", 0.01, (1.0,) * 20, (0.5,) * 20)
    lost = TaskScores("lost", 0.1, (0.1,) * 20, (0.9,) * 20)
    mean = Scores(512, 0, 20, (good, lost)).table()["mean"]
    assert mean["tasks"] == ["good"]
    assert mean["difference"]["mean"] == -0.5


def test_scores_are_printed_written_and_gated(
    kv: Any,
    tmp_path: Path,
) -> None:
    model, run = tiny(tmp_path / "model"), tmp_path / "run"
    (run / "front").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    recipe = run / "front" / "03.toml"
    recipe.write_text(WEAK)
    words = ("apply", recipe, "--model", model, "--sequences", "2", "--context", "128")
    words = (*words, "--continuation", "4", "--bytes-at", "1k", "--suite-items", "2")
    words = (*words, "--suite", "passkey", "--suite-length", "300")
    found = kv.json(*words, "-o", tmp_path / "own.json")
    table = found["data"]["suite"]
    assert (table["recipe"], table["length"]) == ("weak", 300)
    for file in (tmp_path / "own.json", run / "scores" / "03.json"):
        assert json.loads(file.read_text()) == table
    shown = kv(*words)
    assert "passkey" in shown.out
    assert "dense is at chance" in shown.out
    refused = kv.json(*words, "--max-drop", "5%")
    assert refused["error"]["exit_code"] == 2
    assert "at chance" in refused["error"]["what"]


def test_a_drop_beyond_the_limit_fails_the_gate() -> None:
    from kvtune.cli.suite import _verdict

    fallen = Scores(512, 0, 20, (TaskScores("t", 0.0, (1.0,) * 20, (0.8,) * 20),)).difference
    (verdict,) = _verdict(0.05, fallen)
    assert not verdict.passed
    assert verdict.interval is not None
    assert verdict.interval[0] <= verdict.value <= verdict.interval[1]
    assert _verdict(0.25, fallen)[0].passed


@pytest.mark.parametrize("option", [("--max-drop", "5%"), ("-o", "x.json")])
def test_what_needs_a_suite_is_refused_without_one(
    kv: Any,
    option: tuple[str, str],
) -> None:
    found = kv.json("apply", "k4v2", "--model", "demo", *option)
    assert found["error"]["exit_code"] == 2
    assert "--suite" in found["error"]["hint"]


def test_the_demo_model_finds_needles_that_two_bits_lose(demo: tuple[Any, Any]) -> None:
    found = suite.run(*demo, recipes.loads(WEAK), ["niah_single_1"], items=10, length=512)
    (task,) = found.tasks
    table = task.table()
    assert table["dense"]["low"] > table["compressed"]["high"]
    assert table["verdict"] == "worse"
