"""Finds a sentence that does not belong into real prose (needle in a haystack)."""

import random

from kvtune.errors import MissingInputError
from kvtune.haystack import Numerals, hidden, keys, numbers, sentences
from kvtune.task import Count, Item, Task, Turn, fit


class Needle(Task):
    """One number in prose: Python's own reference text, or the text of --data."""

    quick = True

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """Sentences from a drawn place on, from the start again where the text ends.

        Raises:
            MissingInputError: there is no prose.
        """
        if not (lines := sentences(prose[:200_000])):
            raise MissingInputError("The task needle has no text to hide in.", "Give --data.")
        seed, start = rng.random(), rng.randrange(len(lines))
        key, number = keys(rng, 1)[0], numbers(rng, 1)[0]
        needle = f"The special number of the {key} is {number}."
        question = (
            f"\n\nQuestion: What is the special number of the {key}?"
            f"\nAnswer: The special number of the {key} is"
        )

        def build(size: int) -> Item:
            around = [lines[(start + place) % len(lines)] for place in range(size)]
            text, depth = hidden(random.Random(seed), around, [needle])
            return Item(text, (Turn(question, (number,), 12),), Numerals(), depth)

        return fit(build, count, tokens)
