"""What becomes of a trial: complete, infeasible by a constraint, or stopped before its end."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage

from kvtune.errors import ResourceError
from kvtune.study import Choice, Outcome, Row, Seeded, front, rows
from kvtune.table import RESOURCES, Infeasible, Stopped


def load() -> ModuleType:
    """Imports the worker by its path: tests are no package."""
    file = Path(__file__).with_name("study_worker.py")
    spec = importlib.util.spec_from_file_location("study_worker", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small = load().small


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where a study goes."""
    return tmp_path / "study.db"


def told(base: Path) -> optuna.Study:
    """The study as Optuna has it."""
    return optuna.load_study(study_name="s", storage=f"sqlite:///{base}")


def halving(choice: Choice, rows: Sequence[Row]) -> Outcome:
    """Stops what begins worse than the median of the complete rows."""
    bits = [int(x) for x in choice.values()]
    begun = sum(4.0**-x for x in bits)
    others = sorted(float(row.attrs["begun"]) for row in rows if row.state == "complete")
    attrs = {"begun": begun, "seen": float(len(rows))}
    if others and begun > others[len(others) // 2]:
        raise Stopped(attrs)
    return Outcome((begun, float(sum(bits))), attrs)


def limited(choice: Choice, rows: Sequence[Row]) -> Outcome:
    """Allows 6 bits; says beforehand what 8 bits are, measures what 7 are."""
    bits = [int(x) for x in choice.values()]
    excess = {"bits": sum(bits) - 6.0}
    if sum(bits) == 8:
        raise Infeasible({"predicted": 0.5}, excess)
    return Outcome((sum(4.0**-x for x in bits), float(sum(bits))), {"flips": 0.25}, excess)


def test_an_evaluation_sees_the_finished_rows_in_order(base: Path) -> None:
    seen: list[Sequence[Row]] = []

    def look(choice: Choice, rows: Sequence[Row]) -> Outcome:
        seen.append(rows)
        return Outcome((1.0, 2.0))

    table = small(base, look, 12)
    new = [row.number for row in table if row.memo_of is None]
    assert [list(rows) for rows in seen] == [table[:number] for number in new]


def test_a_stopped_trial_is_a_row_with_its_notes_and_never_in_the_front(base: Path) -> None:
    table = small(base, halving, 20)
    stopped = [row for row in table if row.state == "stopped"]
    assert {row.state for row in table} == {"complete", "stopped"}
    assert all(row.values is None and row.attrs["begun"] and not row.excess for row in stopped)
    assert not any(row.state == "stopped" for row in front(table))
    trials = told(base).trials
    states = {row.number: trials[row.number].state.name for row in stopped}
    assert set(states.values()) == {"PRUNED"} and not any(trials[n].constraints for n in states)
    assert not {x.number for x in told(base).best_trials} & states.keys()


def test_a_repeated_configuration_is_answered_as_stopped_too(base: Path) -> None:
    starts = [("good", "4"), ("bad", "2"), ("bad again", "2")]
    given = tuple(Seeded(origin, {"keys": x, "values": x}) for origin, x in starts)
    table = small(base, halving, 3, starts=given)
    assert [row.state for row in table] == ["complete", "stopped", "stopped"]
    assert table[2].memo_of == 1 and table[2].attrs == table[1].attrs


@pytest.mark.parametrize("evaluate", [halving, limited])
@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_search_that_stops_trials_resumed_equals_a_straight_one(
    stop: int, evaluate: object, base: Path
) -> None:
    straight = small(base.with_name("straight.db"), evaluate, 24, seed=4)
    calls = [0]

    def interrupted(choice: Choice, rows: Sequence[Row]) -> Outcome:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        outcome: Outcome = evaluate(choice, rows)  # type: ignore[operator]
        return outcome

    try:
        small(base, interrupted, 24, seed=4)
    except KeyboardInterrupt:
        assert len(rows(str(base), "s")) < len(straight)
    assert small(base, evaluate, 24, seed=4, resume=True) == straight


def test_the_sampler_learns_from_stopped_trials_that_they_were_not_good(base: Path) -> None:
    """Without any complete trial but one, what is stopped fills the side of the bad."""

    def only_fours(choice: Choice, rows: Sequence[Row]) -> Outcome:
        if choice["keys"] != "4":
            raise Stopped()
        return Outcome((1.0, 1.0))

    table = [small(base.with_name(f"{n}"), only_fours, 24, seed=n) for n in range(6)]
    sampled = [row for rows in table for row in rows if row.origin == "sampler"]
    share = sum(row.choice["keys"] == "4" for row in sampled) / len(sampled)
    assert share > 0.5  # a third by chance


def test_a_broken_constraint_makes_a_row_infeasible_with_what_was_measured(base: Path) -> None:
    table = small(base, limited, 1000)
    for row in table:
        bits = sum(int(x) for x in row.choice.values())
        assert row.excess == {"bits": bits - 6.0}
        assert (row.state, row.values is None) == (
            ("complete", False) if bits <= 6 else ("infeasible", True)
        )
        if bits == 7:
            assert row.attrs["flips"] == 0.25 and row.attrs["bytes"] == 7.0
            assert row.attrs["error"] == "over its limit: bits by 1" and row.attrs["kl"]
        if bits == 8:
            assert row.attrs == {"error": "over its limit: bits by 2", "predicted": 0.5}
    assert {sum(map(int, row.choice.values())) for row in front(table)} == {4, 5, 6}
    constraints = [trial.constraints for trial in told(base).trials]
    assert constraints == [row.excess for row in table]
    assert {x.number for x in told(base).best_trials} <= {
        row.number for row in table if row.state == "complete"
    }


@pytest.mark.parametrize(
    ("values", "excess", "found"),
    [
        ((math.nan, 1.0), {}, {RESOURCES: 1.0}),
        ((1.0, math.inf), {"kl": -0.5}, {"kl": -0.5, RESOURCES: 1.0}),
        ((1.0, 1.0), {"kl": 0.0}, {"kl": 0.0}),
        ((1.0, 1.0), {"kl": -1.0, "bits": 2.0}, {"kl": -1.0, "bits": 2.0}),
    ],
)
def test_a_row_keeps_by_how_much_it_breaks_each_constraint(
    values: tuple[float, float], excess: dict[str, float], found: dict[str, float], base: Path
) -> None:
    (row,) = small(base, lambda *_: Outcome(values, {}, excess), 1)
    assert row.excess == found
    assert row.state == ("infeasible" if max(found.values()) > 0 else "complete")


WRITES = ("set_trial_user_attr", "set_trial_system_attr", "set_trial_state_values")


def die_after(lasting: int, patch: pytest.MonkeyPatch) -> None:
    """Lets so many writes about trials last, and raises before the next one."""
    left = iter(range(lasting))

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: object, **named: object) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write(*given, **named)

        return call

    for name in WRITES:
        patch.setattr(RDBStorage, name, dying(getattr(RDBStorage, name)))


@pytest.mark.parametrize("state", ["infeasible", "complete"])
@pytest.mark.parametrize(("lasting", "calls"), list(enumerate([2, 2, 1, 1, 1])))
def test_a_verdict_with_constraints_stands_from_its_second_write_on(
    lasting: int, calls: int, state: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Choice] = []

    def evaluate(choice: Choice, rows: Sequence[Row]) -> Outcome:
        made.append(choice)
        excess = {"a": 1.0 if state == "infeasible" else -1.0, "b": -2.0}
        return Outcome((0.1, float(len(made))), {"try": float(len(made))}, excess)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        die_after(lasting, once)
        small(base, evaluate, 1)
    (row,) = small(base, evaluate, 1, resume=True)
    assert (row.state, row.attrs["try"], len(made)) == (state, calls, calls)
    assert row.values == ((0.1, float(calls)) if state == "complete" else None)
    assert row.excess["b"] == -2.0 and len(row.excess) == 2


@pytest.mark.parametrize("excess", [{}, {"kl": 0.0}, {"kl": -1.0}])
def test_an_infeasible_trial_that_breaks_nothing_is_a_fault(excess: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="breaks a constraint"):
        raise Infeasible({}, excess)


def test_a_trial_that_does_not_fit_is_infeasible_by_its_resources(base: Path) -> None:
    def huge(choice: Choice, rows: Sequence[Row]) -> Outcome:
        raise ResourceError("3 GB asked")

    (row,) = small(base, huge, 1)
    assert row.attrs == {"error": "3 GB asked"} and row.excess == {RESOURCES: 1.0}
