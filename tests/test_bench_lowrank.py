"""Laws of kvtune bench lowrank: what is compared at which bytes, and its verb on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest

from kvtune.bench.compositions import spread
from kvtune.bench.lowrank import BASES, METRICS, Case, cases
from kvtune.cache import weigh
from kvtune.errors import UsageError
from kvtune.models import Facts, facts
from kvtune.saving import check_saves

kv = TINY.kv
CONTEXT = 600


@pytest.fixture
def known(model_of: Any) -> Facts:
    """A model of four kv heads."""
    return facts(model_of("llama", num_hidden_layers=1, num_key_value_heads=4).config)


def weight(case: Case, known: Facts) -> int:
    """True bytes of a case in all layers."""
    policy = case.policy.of_shape(4, 64)
    return weigh(spread(policy, known), known, CONTEXT).bytes


def test_every_rank_meets_both_bases_in_all_metrics_on_each_side(known: Facts) -> None:
    found = [case for case in cases(known, CONTEXT, (0.25, 0.375)) if case.part == "bases"]
    met = {(case.svd.rank, case.svd.basis, case.svd.metric, case.side) for case in found}
    assert len(met) == len(found) == 2 * len(BASES) * len(METRICS) * 3


def test_fewer_heads_meet_all_of_them_at_equal_rank_and_at_no_fewer_bytes(known: Facts) -> None:
    found = [case for case in cases(known, CONTEXT, (0.25,)) if case.part == "heads"]
    wholes = [case for case in found if not case.note]
    assert [case.side for case in wholes] == ["keys", "values"]
    for whole in wholes:
        own = [case for case in found if case.note and case.side == whole.side]
        assert [case.svd.heads for case in own] == [1, 1, 2, 2]
        for case in own:
            if case.note == "equal rank":
                assert case.svd.rank == whole.svd.rank
            else:
                assert weight(case, known) >= weight(whole, known)
                less = case.svd.model_copy(update={"rank": case.svd.rank - 1 / 64})
                fewer = Case.of("heads", case.side, less)
                assert less.rank < whole.svd.rank or weight(fewer, known) < weight(whole, known)


def test_one_thing_differs_between_what_stands_beside_each_other(known: Facts) -> None:
    every = cases(known, CONTEXT, (0.25,))
    centred = [case.svd.centre for case in every if case.part == "centre"]
    assert centred == ["mean", "none"] * 2
    plain, turned = (case for case in every if case.part == "rope")
    assert plain.keys == turned.keys
    assert plain.policy.keys.codecs[1:] == turned.policy.keys.codecs


def test_no_mean_is_taken_from_values_unless_that_is_the_question(known: Facts) -> None:
    for case in cases(known, CONTEXT, (0.25,)):
        if case.values and case.part != "centre":
            assert case.values.centre == "none"


def test_what_saves_no_bytes_at_the_context_is_left_out(known: Facts) -> None:
    found = cases(known, CONTEXT, (0.25, 0.875))
    for case in found:
        check_saves([case.policy.of_shape(4, 64)], known, CONTEXT)
    assert {c.svd.basis for c in found if c.part == "bases" and c.svd.rank > 0.8} == {"calibrated"}


@pytest.mark.parametrize(("ranks", "told"), [((0.3,), "0.3"), ((2.0,), "2")])
def test_a_rank_that_no_recipe_takes_is_refused(
    known: Facts, ranks: tuple[float, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        cases(known, CONTEXT, ranks)


def test_the_verb_tells_every_case_with_its_bytes(kv: Any, tmp_path: Path) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    sizes = ("--sequences", "1", "--context", "400", "--continuation", "16", "--ranks", "0.25")
    words = ("bench", "lowrank", model, "--data", prose, *sizes)
    found = kv.json(*words, "-o", tmp_path / "rows.json")
    assert found["ok"], found["error"]
    rows = found["data"]["rows"]
    assert {row["part"] for row in rows} == {"bases", "heads", "centre", "rope"}
    assert {row["side"] for row in rows} == {"keys", "values", "both"}
    for row in rows:
        assert row["kl"] > 0 and row["bytes"] > 0
        assert 4 < row["long_bits"] < row["bits"] < 16
    assert (tmp_path / "rows.json").is_file()
    said = kv(*words)
    assert said.code == 0
    for told in ("Rank, basis and metric", "Heads that share", "before and after RoPE", "bases"):
        assert told in said.out
    assert kv(*words, "--context", "4k").code == 2
