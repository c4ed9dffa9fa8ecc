"""Small searches for the tests; `study_worker.py MODE DB TRIALS` is one to be killed.

`run` searches until it is killed or done; `hold` stops inside an evaluation; `steps` forks children
that kill themselves after one to three lasting writes to the database, until the search is done;
`full` searches with a disk that fills up.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

from optuna.storages import RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import Engine

from kvtune.errors import ResourceError
from kvtune.study import Choice, Outcome, Row, Seeded, Space, run
from kvtune.table import Evaluate, Infeasible, Stopped

NAME, OBJECTIVES, SEED = "search", ("kl", "bytes"), 7
SMALL = Space({"keys": ("2", "3", "4"), "values": ("2", "3", "4")})
SPACE = Space({name: ("2", "3", "4", "8") for name in ("early", "middle", "late")})
STARTS = (
    Seeded("uniform 4", {"early": "4", "middle": "4", "late": "4"}),
    Seeded("uniform 2", {"early": "2", "middle": "2", "late": "2"}),
    Seeded("uniform 4 again", {"early": "4", "middle": "4", "late": "4"}),
    Seeded("too big", {"early": "8", "middle": "8", "late": "8"}),
    Seeded("too big again", {"early": "8", "middle": "8", "late": "8"}),
    Seeded("known too big", {"early": "8", "middle": "2", "late": "8"}),
    Seeded("measured too big", {"early": "8", "middle": "4", "late": "8"}),
    Seeded("no number", {"early": "8", "middle": "8", "late": "2"}),
)


def evaluate(choice: Choice, rows: Sequence[Row] = ()) -> Outcome:
    """Returns values that follow from the choice alone; large ones fail in three ways.

    The smallest are stopped, by what the rows before them say; some name a constraint.
    """
    bits = [int(choice[name]) for name in SPACE.variables]
    if sum(bits) < 8:
        raise Stopped({"rows": float(len(rows)), "label": choice["late"]})
    if bits == [8, 2, 8]:
        raise Infeasible({"known": "beforehand"}, {"bits": 1.0, "other": -1.0})
    if sum(bits) > 20:
        raise ResourceError(f"{sum(bits)} bits do not fit")
    if bits == [8, 8, 2]:
        return Outcome((float("nan"), 18.0))
    noise = sha256(repr(bits).encode()).digest()[0] / 2560
    loss = sum(weight * 4.0**-b for weight, b in zip((1, 3, 2), bits, strict=True)) + noise
    attrs = {"first": float(bits[0]), "label": choice["late"]}
    excess = {"bits": sum(bits) - 17.0, "other": -1.0} if bits[1] > 3 else {}
    return Outcome((loss, float(sum(bits))), attrs, excess)


def slowly(choice: Choice, rows: Sequence[Row]) -> Outcome:
    """Takes 20 ms."""
    time.sleep(0.02)
    return evaluate(choice, rows)


def hold(choice: Choice, rows: Sequence[Row]) -> Outcome:
    """Says that it has begun and never ends."""
    print("held", flush=True)
    while True:
        time.sleep(60)


def search(base: str, trials: int, how: Evaluate = evaluate, resume: bool = True) -> list[Row]:
    """Runs the search on a database file."""
    return run(
        f"sqlite:///{base}",
        NAME,
        SPACE,
        STARTS,
        how,
        objectives=OBJECTIVES,
        trials=trials,
        seed=SEED,
        resume=resume,
        context="model 1",
    )


class Counting:
    """An evaluator that counts its calls, by the configuration."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, choice: Choice, rows: Sequence[Row] = ()) -> Outcome:
        """Trades a loss against bytes."""
        self.calls.append(tuple(choice.values()))
        bits = [int(x) for x in choice.values()]
        return Outcome((sum(4.0**-x for x in bits), float(sum(bits))))


def small(
    base: Path,
    evaluate: Evaluate,
    trials: int,
    *,
    space: Space = SMALL,
    starts: tuple[Seeded, ...] = (),
    seed: int = 1,
    seconds: float | None = None,
    resume: bool = False,
    context: str = "",
    on_trial: Callable[[Row, int], None] | None = None,
) -> list[Row]:
    """Runs a search of nine configurations."""
    return run(
        f"sqlite:///{base}",
        "s",
        space,
        starts,
        evaluate,
        objectives=("kl", "bytes"),
        trials=trials,
        seed=seed,
        seconds=seconds,
        resume=resume,
        context=context,
        on_trial=on_trial,
    )


def die_after(lasting: int) -> None:
    """Arms this process: after so many writes that last, it kills itself as the next one begins."""
    state = {"left": lasting, "pending": False}

    def before(_c: object, _k: object, statement: str, *_: object) -> None:
        word = statement.split()[0].upper()
        if word in ("INSERT", "UPDATE", "DELETE", "CREATE"):
            if state["left"] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            state["pending"] = word != "CREATE"
            state["left"] -= word == "CREATE"  # SQLite keeps a new table at once

    def commit(_c: object) -> None:
        state["left"] -= state["pending"]
        state["pending"] = False

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "commit", commit)


def step(base: str, trials: int, lasting: int) -> int:
    """Lets a child go that many writes further; returns its wait status."""
    if not (child := os.fork()):
        die_after(lasting)
        search(base, trials)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def steps(base: str, trials: int) -> None:
    """Prints how many children died before one found nothing left to write."""
    # One to three: a life that only repeats the last one's unfinished write would get nowhere.
    lives, deaths = Random(SEED), 0
    RDBStorage("sqlite://").engine.dispose()  # imports once what every child needs
    while status := step(base, trials, lives.randint(1, 3)):
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"a child failed with wait status {status}")
        deaths += 1
    print(deaths)


def full(base: str, trials: int) -> None:
    """Searches while no file may grow beyond 150 KB; prints the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    try:
        search(base, trials)
    except ResourceError as error:
        print(f"ResourceError {error}")


if __name__ == "__main__":
    mode, base, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    if mode == "steps":
        steps(base, count)
    elif mode == "full":
        full(base, count)
    else:
        search(base, count, hold if mode == "hold" else slowly)
