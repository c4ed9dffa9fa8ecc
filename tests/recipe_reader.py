"""Reads recipe files in a process that is watched: `python recipe_reader.py FILES SAMPLES`.

Prints one JSON object: how many files were read and refused, what else was raised, every exec,
compile, import, process, socket or foreign open that was seen, the slowest file and the memory that
was added.
"""

import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvtune import recipe as recipes
from kvtune.errors import IntegrityError

WATCHED = ("exec", "compile", "import", "open", "subprocess", "socket", "os.system", "os.exec")


def peak() -> int:
    """The most memory that this process ever held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(files: list[Path], samples: list[Path]) -> dict[str, Any]:
    """Reads the samples, which are sound, unwatched; then every file, watched."""
    for sample in samples:
        recipes.load(sample)
    seen: Counter[str] = Counter()
    current = ""
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        own = event == "open" and str(arguments[0]) == current
        if watching and not own and event.startswith(WATCHED):
            seen[f"{event} {arguments[:1]!r}"] += 1

    sys.addaudithook(hook)
    eval("1")  # else a hook that sees nothing would prove nothing
    assert seen
    seen.clear()
    told: Counter[str] = Counter()
    before, slowest = peak(), 0.0
    for file in files:
        current, start = str(file), time.process_time()
        try:
            recipes.load(file)
            told["read"] += 1
        except IntegrityError as error:
            told["refused" if len(str(error)) < 1000 else f"at length {error!s:.300}"] += 1
        except BaseException as error:
            told[f"{type(error).__name__} {error!s:.200} from {file.name}"] += 1
        slowest = max(slowest, time.process_time() - start)
    watching = False
    return {"told": told, "seen": seen, "slowest": slowest, "added_kib": peak() - before}


if __name__ == "__main__":
    given = [
        [Path(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        for name in sys.argv[1:]
    ]
    print(json.dumps(main(*given)))
