"""Laws of retrieval scores: what a head gives the needle, in which rows, and which runs count."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from cli_tiny import tiny

from kvtune import retrieval
from kvtune import task as tasks
from kvtune.errors import UsageError
from kvtune.models import load_model
from kvtune.retrieval import Found, Run, looked_up, retrieval_scores, to_run

PROSE = "\n\n".join(topics[name] for name in sorted(topics)[:12])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tiny(tmp_path_factory.mktemp("model"))
    return load_model(str(folder), offline=True)


def test_the_needle_of_a_run_is_its_sentence(small: tuple[Any, Any]) -> None:
    tokenizer = small[1]
    for seed in range(8):
        item = tasks.find("needle").make(
            random.Random(seed), lambda text: len(tokenizer(text)["input_ids"]), 500, PROSE
        )
        run = to_run(tokenizer, item)
        needle = tokenizer.decode(run.read[run.needle]).strip()
        assert needle.startswith("The special number of the ")
        assert needle.endswith(f" is {item.references[0]}.")
        assert tokenizer.decode(run.answer) == f" {item.references[0]}"
        assert tokenizer.decode(run.read).endswith(" is")


def test_the_mass_is_what_the_rows_of_the_answer_give_the_needle(llama: Any, draw: Any) -> None:
    read = draw(1, 30)[0].tolist()
    read[5:9] = [10, 11, 12, 13]
    run = Run(read, [11, 60, 13], slice(5, 9))
    own = llama.config._attn_implementation
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        out = llama(torch.tensor([[*read, 11, 60]]), output_attentions=True)
    llama.set_attn_implementation(own)
    # 60 is not in the needle: the row that tells it does not count
    rows = [29, 31]
    wanted = torch.stack([a[0][:, rows, 5:9].sum(-1).mean(-1) for a in out.attentions])
    torch.testing.assert_close(looked_up(llama, run).mass, wanted.float())


def test_an_answer_is_right_when_the_model_would_say_it(llama: Any, draw: Any) -> None:
    read = draw(1, 30)[0]
    with torch.no_grad():
        said = llama.generate(read[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    answer = said[0, 30:].tolist()
    assert looked_up(llama, Run(read.tolist(), answer, slice(3, 6))).right
    wrong = [*answer[:2], (answer[2] + 1) % 61]
    assert not looked_up(llama, Run(read.tolist(), wrong, slice(3, 6))).right


@pytest.mark.parametrize(("right", "used"), [(3, 6), (4, 4), (6, 6)])
def test_runs_count_whose_answer_is_right_where_these_are_enough(
    small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, right: int, used: int
) -> None:
    made = iter(range(6))

    def looked(model: Any, run: Run) -> Found:
        place = next(made)
        return Found(torch.full((2, 2), float(place)), place < right)

    monkeypatch.setattr(retrieval, "looked_up", looked)
    scores, said = retrieval_scores(*small, PROSE, runs=6, length=300)
    assert said == {
        "runs": 6,
        "length": 300,
        "right": right,
        "used": used,
        "only_right": right >= retrieval.ENOUGH,
    }
    assert torch.equal(scores, torch.full((2, 2), sum(range(used)) / used))


def test_scores_repeat_and_are_shares_of_attention(small: tuple[Any, Any]) -> None:
    one, two = (retrieval_scores(*small, PROSE, runs=2, length=300)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (2, 2)
    assert (one > 0).all()
    assert (one < 1).all()


def test_runs_beyond_the_models_positions_are_refused(small: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="2,000 tokens exceed the model's 1,024 positions"):
        retrieval_scores(*small, PROSE, length=2000)
