"""Follows a chain of variables to all that hold one value (RULER, arXiv:2404.06654)."""

import random
import string
from itertools import pairwise

from kvtune.haystack import filler
from kvtune.task import Count, Item, Task, Turn, fit

HOPS = 4


class Vt(Task):
    """Variable tracking: which five variables hold the value, through four hops."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """A worked example, then a chain in filler beside a second chain of another value."""
        names, values = _names(rng, 4 * (HOPS + 1)), rng.sample(range(10_000, 100_000), 3)
        chains = [names[i : i + HOPS + 1] for i in range(0, len(names), HOPS + 1)]
        seed = rng.random()
        shown = _text(random.Random(seed), 4, [(chains[0], values[0])])
        solved = f"{shown}{_question(values[0])} {', '.join(chains[0])}.\n\n"

        def build(size: int) -> Item:
            links = [(chains[1], values[1]), (chains[2], values[2])]
            text = _text(random.Random(seed), size, links)
            turn = Turn(_question(values[1]), tuple(chains[1]), 30)
            return Item(solved + text, (turn,), [*chains[1], *chains[2]])

        return fit(build, count, tokens)


def _names(rng: random.Random, count: int) -> list[str]:
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(rng.choices(string.ascii_uppercase, k=5)))
    names = sorted(found)
    rng.shuffle(names)
    return names


def _text(rng: random.Random, size: int, links: list[tuple[list[str], int]]) -> str:
    """Filler with the statements of each chain, in their order, at drawn places."""
    lines = filler(size)
    placed: list[tuple[int, int, str]] = []
    for names, value in links:
        said = [f"VAR {names[0]} = {value}."]
        said += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        places = sorted(rng.randrange(size + 1) for _ in said)
        placed += [
            (place, i, line) for i, (place, line) in enumerate(zip(places, said, strict=True))
        ]
    for place, _, line in sorted(placed, reverse=True):
        lines.insert(place, line)
    return "\n".join(lines)


def _question(value: int) -> str:
    return (
        f"\nQuestion: Which variables have the value {value}?"
        f"\nAnswer: The {HOPS + 1} variables that have the value {value} are:"
    )
