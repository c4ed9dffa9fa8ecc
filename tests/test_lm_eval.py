"""Laws of kvtune.lm_eval: without compression the harness's numbers, else those of the cache."""

import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError, UnsupportedError
from kvtune.lm_eval import KvtuneLM
from kvtune.models import fingerprint, load_model
from kvtune.shipped import find

ROWS = 5
TASKS = ("choice", "answer", "flow")
METRICS = {"choice": "acc,none", "answer": "exact_match,none", "flow": "word_perplexity,none"}


def load_tiny() -> ModuleType:
    file = Path(__file__).with_name("cli_tiny.py")
    spec = importlib.util.spec_from_file_location("cli_tiny", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = load_tiny()


def chain(bits: int) -> str:
    table = f'{{ use = "affine", bits = {bits}, group = "head", axis = "token" }}'
    return f'kvtune = 1\n[[layers]]\nspan = "all"\nkept.keys = [{table}]\nkept.values = [{table}]'


TWO, EIGHT = recipes.loads(chain(2), "two"), recipes.loads(chain(8), "eight")
EMPTY = recipes.loads("kvtune = 1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and three tasks on local JSON data."""
    folder = tmp_path_factory.mktemp("lm-eval")
    TINY.tiny(folder / "model")
    words = TINY.text(folder / "text.txt").read_text().split()
    pieces = [" ".join(words[120 * i : 120 * (i + 1)]) for i in range(ROWS)]
    rows = [
        {"text": piece, "choices": ["yes indeed", "no", "the same"], "gold": i % 3, "said": "b"}
        for i, piece in enumerate(pieces)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": str(folder / "rows.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    more: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "flow": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    (folder / "tasks").mkdir()
    for name, own in more.items():
        # JSON is YAML
        text = json.dumps({"task": name, **common, **own})
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def opened(place: Path) -> tuple[Any, Any]:
    """The tiny model in double precision, so that rounding decides nothing, and its tokenizer."""
    model, tokenizer = load_model(str(place / "model"))
    return model.double(), tokenizer


@pytest.fixture(autouse=True)
def _still(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = opened[0].config._attn_implementation
    yield
    opened[0].set_attn_implementation(own)


def stock(opened: tuple[Any, Any], **more: Any) -> HFLM:
    model, tokenizer = opened
    return HFLM(pretrained=model, tokenizer=tokenizer, **more)


def under(opened: tuple[Any, Any], recipe: Any, **more: Any) -> KvtuneLM:
    model, tokenizer = opened
    return KvtuneLM(model, recipe, tokenizer, **more)


def evaluated(place: Path, language_model: Any, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """The harness's results, its samples among them."""
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        language_model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    return dict(found)


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model said to each request of each task."""
    return {task: [row["resps"] for row in rows] for task, rows in found["samples"].items()}


def numbers(nested: Any) -> list[float]:
    """All numbers in nested lists and tuples."""
    if isinstance(nested, list | tuple):
        return [number for inner in nested for number in numbers(inner)]
    return [] if isinstance(nested, str) else [float(nested)]


def scores(nested: dict[str, list[Any]]) -> torch.Tensor:
    return torch.tensor(numbers([nested["choice"], nested["flow"]]), dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(place: Path, opened: tuple[Any, Any]) -> dict[str, list[Any]]:
    return answers(evaluated(place, stock(opened)))


def test_an_empty_recipe_gives_the_harness_its_own_numbers(
    place: Path, opened: tuple[Any, Any], plain: dict[str, list[Any]]
) -> None:
    assert answers(evaluated(place, under(opened, EMPTY))) == plain


def test_a_way_that_compresses_nothing_gives_the_same_up_to_rounding(
    place: Path, opened: tuple[Any, Any], plain: dict[str, list[Any]]
) -> None:
    split = under(opened, EMPTY)
    split._compresses = True
    found = answers(evaluated(place, split))
    assert found["answer"] == plain["answer"]
    torch.testing.assert_close(scores(found), scores(plain), rtol=1e-6, atol=1e-5)


def test_two_bits_change_every_kind_of_task_and_eight_change_less(
    place: Path, opened: tuple[Any, Any], plain: dict[str, list[Any]]
) -> None:
    whole = evaluated(place, under(opened, TWO))
    two, eight = answers(whole), answers(evaluated(place, under(opened, EIGHT)))
    for task in ("choice", "flow"):
        for one, dense in zip(two[task], plain[task], strict=True):
            assert numbers(one) != numbers(dense)
    assert two["answer"] != plain["answer"]
    far, near = (scores(found) - scores(plain) for found in (two, eight))
    assert near.abs().mean() < far.abs().mean() / 10
    for task, metric in METRICS.items():
        assert metric in whole["results"][task]
    assert whole["config"]["recipe"]["digest"] == recipes.digest(TWO)


def stepwise(model: Any, cache: Any, tokens: list[int], said: list[int]) -> float:
    """The log-likelihood of `said` behind `tokens`, one token at a time behind the prompt."""
    first = max(1, len(tokens) - 1)
    steps = [tokens[:first], *([token] for token in [*tokens, *said][first:-1])]
    total, at = 0.0, 0
    for step in steps:
        logits = model(torch.tensor([step]), past_key_values=cache).logits[0, -1]
        at += len(step)
        if at >= len(tokens):
            wanted = [*tokens, *said][at]
            total += float(logits.float().log_softmax(-1)[wanted])
    return total


@pytest.mark.parametrize("length", [1, 2, 90])
def test_a_score_is_that_of_generation_forced_to_say_the_same(
    opened: tuple[Any, Any], length: int
) -> None:
    language_model = under(opened, TWO)
    tokens = [(7 * i * i + 3) % 290 + 3 for i in range(length + 40)]
    context, said = tokens[:length], tokens[length:]
    ((found, _),) = language_model._loglikelihood_tokens([(None, context, said)], True)
    with torch.no_grad():
        wanted = stepwise(opened[0], language_model._empty.fresh(), context, said)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_scores_depend_neither_on_chunks_nor_on_batches_nor_on_order(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [(5 * i * i + 1) % 290 + 3 for i in range(400)]
    shared = tokens[:60]
    asked: list[Any] = [
        (None, tokens[:1], tokens[1:201]),
        (("a", "b"), shared, tokens[60:61]),
        (("a", "c"), shared, tokens[70:74]),
        (("a", "c"), shared, tokens[70:74]),
        (None, tokens[:30], tokens[30:90]),
    ]
    whole = under(opened, TWO, batch_size=4)._loglikelihood_tokens(asked, True)
    turned = under(opened, TWO)._loglikelihood_tokens(asked[::-1], True)[::-1]
    assert turned == whole
    for chunk in (1, 7, 64):
        monkeypatch.setattr("kvtune.lm_eval.CHUNK", chunk)
        found = under(opened, TWO)._loglikelihood_tokens(asked, True)
        assert numbers(found) == pytest.approx(numbers(whole), rel=1e-6)


def test_a_text_beyond_the_window_is_cut_on_the_left_as_the_harness_cuts_it(
    opened: tuple[Any, Any],
) -> None:
    tokens = [(3 * i * i + 1) % 290 + 3 for i in range(300)]
    asked: list[Any] = [(None, tokens[:200], tokens[200:])]
    dense = stock(opened, max_length=120)._loglikelihood_tokens(asked, True)
    split = under(opened, EMPTY, max_length=120)
    split._compresses = True
    assert numbers(split._loglikelihood_tokens(asked, True)) == pytest.approx(
        numbers(dense), rel=1e-6
    )


def test_greedy_is_what_generation_says(opened: tuple[Any, Any]) -> None:
    language_model, (model, _) = under(opened, TWO), opened
    tokens = [(11 * i * i + 5) % 290 + 3 for i in range(80)]
    prompt = torch.tensor([tokens])
    made = language_model._model_generate(
        prompt, prompt.shape[1] + 6, ["\x00"], attention_mask=torch.ones_like(prompt)
    )
    said = made[0, len(tokens) :].tolist()
    asked: list[Any] = [(None, tokens, said), (None, tokens, [*said[:-1], (said[-1] + 1) % 300])]
    found = language_model._loglikelihood_tokens(asked, True)
    assert [greedy for _, greedy in found] == [True, False]
    assert model.dtype == torch.float64


def test_a_padded_row_answers_as_it_does_alone(place: Path, opened: tuple[Any, Any]) -> None:
    alone = answers(evaluated(place, under(opened, TWO), ("answer",)))
    together = answers(evaluated(place, under(opened, TWO, batch_size=ROWS), ("answer",)))
    assert together == alone
    language_model = under(opened, TWO)
    short = torch.tensor([[0, 0, 5], [7, 8, 9]])
    made = language_model._model_generate(short, 6, ["\x00"], attention_mask=(short > 0).long())
    assert made.shape == (2, 6)


def test_the_model_is_known_to_the_harness_by_its_name(place: Path, opened: Any) -> None:
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    given: dict[str, Any] = {
        "pretrained": str(place / "model"),
        "recipe": "kivi-2",
        "dtype": "float32",
    }
    given |= {"device": None if torch.cuda.is_available() else "cuda:0"}  # as its command line
    found = lm_eval.simple_evaluate(
        "kvtune", model_args=given, tasks=["flow"], task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    assert found["config"]["recipe"]["name"] == recipes.load(find("kivi-2")).name


def test_another_models_recipe_and_remote_code_are_refused(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    other = "sha256:" + "0" * 64
    binding = f"""[model]
name = "other"
fingerprint = "{other}"
architecture = "LlamaForCausalLM"
layers = 2
kv_heads = 1
head_dim = 64
"""
    bound = recipes.loads(chain(2).replace("[[layers]]", f"{binding}\n[[layers]]"))
    with pytest.raises(IntegrityError, match="tuned for other"):
        KvtuneLM(model, bound, tokenizer)
    assert fingerprint(model) != other
    assert KvtuneLM(model, bound, tokenizer, force=True)._compresses
    with pytest.raises(UnsupportedError, match="remote code"):
        KvtuneLM(model, TWO, tokenizer, trust_remote_code=True)
