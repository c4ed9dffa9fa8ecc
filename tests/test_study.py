"""The search loop is deterministic, survives being killed anywhere, and never answers twice."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import ModuleType

import optuna
import pytest

from kvtune.errors import IntegrityError, MissingInputError, ResourceError, UsageError
from kvtune.study import Choice, Outcome, Row, Seeded, Space, fresh, front, rows

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("study_worker.py")
TRIALS = 25


def load() -> ModuleType:
    """Imports the worker by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location("study_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load()
SMALL, Counting, small = worker.SMALL, worker.Counting, worker.small


def stored(base: Path) -> list[Row]:
    """Reads the worker's table from the file."""
    return rows(f"sqlite:///{base}", worker.NAME)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The table of a search that nothing disturbed."""
    base = tmp_path_factory.mktemp("straight") / "study.db"
    table: list[Row] = worker.search(str(base), TRIALS)
    return table


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where a study goes."""
    return tmp_path / "study.db"


def test_the_reference_search_meets_every_kind_of_row(straight: list[Row]) -> None:
    assert [row.number for row in straight] == list(range(TRIALS))
    count = len(worker.STARTS)
    assert [row.origin for row in straight[:count]] == [x.origin for x in worker.STARTS]
    assert {row.origin for row in straight[count:]} == {"random", "sampler"}
    assert {row.state for row in straight} == {"complete", "infeasible", "stopped"}
    assert {len(row.excess) for row in straight if row.values} == {0, 2}
    assert {row.memo_of is None for row in straight} == {True, False}
    assert any("not finite" in str(row.attrs.get("error")) for row in straight)


def test_the_same_search_gives_the_same_table(straight: list[Row], base: Path) -> None:
    assert worker.search(str(base), TRIALS) == straight == stored(base)


def test_another_seed_gives_another_table(base: Path) -> None:
    assert small(base, Counting(), 6, seed=1) != small(base.with_name("b"), Counting(), 6, seed=2)


@pytest.mark.parametrize("stop", [3, 5, 15])
def test_a_search_stopped_and_resumed_equals_a_straight_one(
    stop: int, straight: list[Row], base: Path
) -> None:
    assert worker.search(str(base), stop) == straight[:stop]
    assert worker.search(str(base), TRIALS) == straight


def test_a_finished_search_resumed_returns_its_rows_unasked(base: Path) -> None:
    evaluate = Counting()
    first = small(base, evaluate, 6)
    calls = len(evaluate.calls)
    assert small(base, evaluate, 6, resume=True) == first
    assert len(evaluate.calls) == calls


def test_every_configuration_is_evaluated_once(base: Path) -> None:
    evaluate = Counting()
    again = Seeded("again", {"values": "2", "keys": "2"})
    table = small(base, evaluate, 20, starts=(Seeded("first", {"keys": "2", "values": "2"}), again))
    assert len(set(evaluate.calls)) == len(evaluate.calls)
    assert len(evaluate.calls) == sum(row.memo_of is None for row in table)
    assert table[1].memo_of == 0 and table[1].values == table[0].values
    for row in table:
        first = next(x for x in table if x.choice == row.choice)
        assert row.memo_of == (None if first is row else first.number)
        assert (row.values, row.attrs) == (first.values, first.attrs)


def test_after_three_memo_answers_a_new_configuration_comes(tmp_path: Path) -> None:
    tables = [small(tmp_path / f"{seed}.db", Counting(), 100, seed=seed) for seed in (2, 5)]
    memos = ["".join("." if row.memo_of is None else "m" for row in table) for table in tables]
    assert any("mmm" in memo for memo in memos)
    assert not any("mmmm" in memo for memo in memos)


def test_a_spent_space_ends_the_search(base: Path) -> None:
    evaluate = Counting()
    table = small(base, evaluate, 1000)
    assert sorted(evaluate.calls) == sorted(itertools.product("234", repeat=2))
    assert len(table) < 60 and table[-1].memo_of is None
    assert small(base, evaluate, 1000, resume=True) == table


def test_starts_beyond_the_trials_wait_for_a_resume(base: Path) -> None:
    starts = tuple(Seeded(f"start {x}", {"keys": x, "values": x}) for x in "432")
    assert [row.origin for row in small(base, Counting(), 2, starts=starts)] == [
        "start 4",
        "start 3",
    ]
    assert small(base, Counting(), 3, starts=starts, resume=True)[2].origin == "start 2"


def test_infeasible_rows_stay_out_of_the_front_and_the_search_goes_on(base: Path) -> None:
    def tight(choice: Choice, rows: Sequence[Row]) -> Outcome:
        if choice["keys"] == "2":
            raise ResourceError("out of memory: 3 GB asked")
        bytes_ = float("inf") if choice["values"] == "2" else 1.0
        return Outcome((0.5, bytes_), {"seconds": 1.0})

    table = small(base, tight, 1000)
    bad = [row for row in table if "2" in row.choice.values()]
    assert {row.state for row in bad} == {"infeasible"}
    assert all(row.values is None and row.attrs["error"] for row in bad)
    assert any(row.attrs["error"] == "out of memory: 3 GB asked" for row in bad)
    best = front(table)
    assert best and not any(row in bad for row in best)
    store = optuna.storages.RDBStorage(f"sqlite:///{base}")
    study = optuna.load_study(study_name="s", storage=store)
    assert not {trial.number for trial in study.best_trials} & {row.number for row in bad}
    marked = {x.number for x in study.trials if any(v > 0 for v in x.constraints.values())}
    assert marked == {row.number for row in bad}
    assert study.metric_names == ["kl", "bytes"]
    store.engine.dispose()


def test_no_trial_starts_after_the_time(base: Path) -> None:
    assert small(base, Counting(), 6, seconds=0.0) == []

    def slow(choice: Choice, rows: Sequence[Row]) -> Outcome:
        time.sleep(0.2)
        return Outcome((1.0, 1.0))

    assert 0 < len(small(base, slow, 1000, seconds=0.5)) < 20


def test_every_told_row_is_reported_with_the_total(base: Path) -> None:
    seen: list[tuple[Row, int]] = []
    table = small(base, Counting(), 6, on_trial=lambda row, total: seen.append((row, total)))
    assert seen == [(row, 6) for row in table]


def test_rows_are_not_overwritten_unasked_and_fresh_deletes_them(base: Path) -> None:
    small(base, Counting(), 3)
    before = base.read_bytes()
    with pytest.raises(UsageError, match=r"--resume to go on or --fresh"):
        small(base, Counting(), 3)
    assert base.read_bytes() == before
    fresh(f"sqlite:///{base}", "s")
    fresh(f"sqlite:///{base}", "s")
    assert len(small(base, Counting(), 2)) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": "model 2"}, "model, texts or settings"),
        ({"space": Space({**SMALL.variables, "keys": ("2", "3")})}, "space"),
        ({"starts": (Seeded("new", {"keys": "2", "values": "2"}),)}, "start points"),
    ],
)
def test_a_study_resumed_as_another_search_is_refused_untouched(
    change: dict[str, object], named: str, base: Path
) -> None:
    small(base, Counting(), 3)
    before = base.read_bytes()
    with pytest.raises(IntegrityError, match=named) as caught:
        small(base, Counting(), 6, resume=True, **change)
    assert "--fresh" in str(caught.value)
    assert base.read_bytes() == before


def test_what_is_missing_is_named(base: Path) -> None:
    with pytest.raises(MissingInputError, match="no study"):
        rows(f"sqlite:///{base}", "s")
    assert not base.exists()
    small(base, Counting(), 1)
    with pytest.raises(MissingInputError, match="no study 't'"):
        rows(f"sqlite:///{base}", "t")
    with pytest.raises(MissingInputError, match="does not exist"):
        small(base.parent / "nowhere" / "study.db", Counting(), 1)


@pytest.mark.parametrize("file", ["with space.db", "100%.db", "{braces}.db"])
def test_any_file_name_will_do_as_url_or_as_path(file: str, tmp_path: Path) -> None:
    table = small(tmp_path / file, Counting(), 3)
    assert (tmp_path / file).exists()
    assert rows(str(tmp_path / file), "s") == table


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"keys": "5", "values": "2"}, "sets keys to '5'"),
        ({"keys": "2"}, "lacks or adds variables: values"),
    ],
)
def test_a_start_outside_the_space_is_refused(choice: Choice, words: str, base: Path) -> None:
    with pytest.raises(UsageError, match=words):
        small(base, Counting(), 3, starts=(Seeded("odd", choice),))
    assert not base.exists()


def test_the_wrong_url_and_the_double_option_are_refused() -> None:
    with pytest.raises(UsageError, match="--storage"):
        fresh("nosuch://", "s")
    with pytest.raises(UsageError, match="each once"):
        Space({"keys": ("2", "2")})


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_is_what_brute_force_finds(objectives: int) -> None:
    rng = Random(objectives)
    table = [
        Row(
            n,
            "",
            {"x": str(n)},
            tuple(float(rng.randrange(9)) for _ in range(objectives)),
            "",
            None,
            {},
        )
        for n in range(200)
    ]
    table.append(dataclasses.replace(table[0], number=200, memo_of=0))

    def beaten(a: Row, b: Row) -> bool:
        pairs = list(zip(a.values or (), b.values or (), strict=True))
        return all(y <= x for x, y in pairs) and any(y < x for x, y in pairs)

    best = [a for a in table[:200] if not any(beaten(a, b) for b in table)]
    found = front(table)
    assert sorted(row.number for row in found) == [row.number for row in best]
    assert [row.values for row in found] == sorted(row.values or () for row in found)


def test_the_search_loop_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, kvtune.study; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"
