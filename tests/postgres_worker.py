"""One of several workers on a server: `postgres_worker.py MODE URL LOG LEASE`, one to be killed.

`search:N` evaluates N starts, `resume:N` goes on with them; `hang:N` stops inside its second
evaluation; `sample` goes on past few starts; `share` prints a shared value; `sole` prints whether
it is the only one, and stays.
Each evaluation notes in LOG that it begins.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from kvtune.commons import shared, sole
from kvtune.study import Choice, Outcome, Row, Seeded, Space, run
from kvtune.table import Evaluate

NAME = "search"
SPACE = Space({name: ("2", "3", "4", "8") for name in ("first", "early", "middle", "late")})
SAMPLED, FEW = 60, 12


def starts(count: int) -> tuple[Seeded, ...]:
    """The first configurations of the space."""
    return tuple(Seeded(f"start {n}", SPACE.at(n)) for n in range(count))


def evaluate(choice: Choice, rows: Sequence[Row] = ()) -> Outcome:
    """Values that follow from the choice alone."""
    bits = [int(choice[name]) for name in SPACE.variables]
    noise = sha256(repr(bits).encode()).digest()[0] / 2560
    return Outcome((sum(4.0**-b for b in bits) + noise, float(sum(bits))))


def noted(log: str, hang: int = 0) -> Evaluate:
    """Notes each evaluation; the one of the number `hang` says so, and waits for a file."""
    calls: list[Choice] = []

    def slowly(choice: Choice, rows: Sequence[Row]) -> Outcome:
        with Path(log).open("a") as file:  # a short line is appended whole
            file.write(f"{os.getpid()} {' '.join(choice.values())}\n")
        calls.append(choice)
        if len(calls) == hang:
            print("held", flush=True)
            while not Path(f"{log}.go").exists():
                time.sleep(0.01)
        time.sleep(0.02)
        return Outcome(evaluate(choice).values, {"worker": float(os.getpid())})

    return slowly


def search(
    url: str,
    count: int,
    how: Evaluate = evaluate,
    *,
    given: int | None = None,
    lease: float = 60.0,
    resume: bool = False,
    seconds: float | None = None,
    on_trial: Callable[[Row, int], None] | None = None,
) -> list[Row]:
    """Searches the space from its first configurations; all trials are starts by default."""
    return run(
        url,
        NAME,
        SPACE,
        starts(count if given is None else given),
        how,
        objectives=("kl", "bytes"),
        trials=count,
        seed=3,
        lease=lease,
        resume=resume,
        seconds=seconds,
        on_trial=on_trial,
    )


def share(url: str) -> None:
    """Prints the one value of all workers."""
    print(shared(url, NAME, "scale", lambda: {"pid": os.getpid(), "of": [0.1 + 0.2, None]}))


def stay(url: str, lease: float) -> None:
    """Prints whether this worker is the only one, and keeps what it has."""
    with sole(url, NAME, "proof", lease) as mine:
        print(mine, flush=True)
        time.sleep(60)


if __name__ == "__main__":
    mode, url, log, lease = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    if mode == "share":
        share(url)
    elif mode == "sole":
        stay(url, lease)
    elif mode == "sample":
        print(len(search(url, SAMPLED, noted(log), given=FEW, lease=lease)))
    else:
        again, hang = mode.startswith("resume"), 2 * mode.startswith("hang")
        count = int(mode.partition(":")[2])
        print(len(search(url, count, noted(log, hang), lease=lease, resume=again)))
