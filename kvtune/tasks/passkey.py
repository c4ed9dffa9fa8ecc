"""Recalls a key that is said twice in filler (landmark attention, arXiv:2305.16300)."""

import random

from kvtune.haystack import Numerals, filler, hidden, numbers
from kvtune.task import Count, Item, Task, Turn, fit

KEYS = range(10_000, 50_000)


class Passkey(Task):
    """A key of five digits that one line in repeated filler says twice."""

    quick = True

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """The haystack is filler sentences, their number found by bisection."""
        seed, key = rng.random(), numbers(rng, 1, KEYS)[0]
        line = (
            f"The pass key is the number {key}. Keep in mind that the number {key} is the pass key."
        )

        def build(size: int) -> Item:
            text, depth = hidden(random.Random(seed), filler(size), [line])
            turn = Turn("\n\nWhat is the pass key? The pass key is the number", (key,), 10)
            return Item(text, (turn,), Numerals(KEYS), depth)

        return fit(build, count, tokens)
