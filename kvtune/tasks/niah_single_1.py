"""Finds one number in repeated filler (RULER, arXiv:2404.06654)."""

import random

from kvtune.haystack import Numerals, filler, hidden, keys, numbers
from kvtune.task import Count, Item, Task, Turn, fit


class NiahSingle1(Task):
    """One number in repeated filler; nothing competes with it."""

    quick = True

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """The haystack is filler sentences, their number found by bisection."""
        seed, key, number = rng.random(), keys(rng, 1)[0], numbers(rng, 1)[0]
        needle = f"The special number of the {key} is {number}."

        def build(size: int) -> Item:
            text, depth = hidden(random.Random(seed), filler(size), [needle])
            question = (
                f"\n\nQuestion: What is the special number of the {key}?"
                f"\nAnswer: The special number of the {key} is"
            )
            return Item(text, (Turn(question, (number,), 12),), Numerals(), depth)

        return fit(build, count, tokens)
