"""Finds one number among many of the same form (RULER, arXiv:2404.06654)."""

import random

from kvtune.haystack import keys, numbers
from kvtune.task import Count, Item, Task, Turn, fit


class NiahMultikey2(Task):
    """One number among many; the haystack is nothing but such sentences."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """The haystack is needles, word to number; one of them is asked for."""
        seed = rng.random()

        def build(size: int) -> Item:
            own = random.Random(seed)
            place = own.random()  # first, so that the depth is the same at every size
            values, names = numbers(own, size), keys(own, size)
            asked = int(place * size)
            lines = [
                f"The special number of the {key} is {value}."
                for key, value in zip(names, values, strict=True)
            ]
            question = (
                f"\n\nQuestion: What is the special number of the {names[asked]}?"
                f"\nAnswer: The special number of the {names[asked]} is"
            )
            turn = Turn(question, (values[asked],), 12)
            return Item("\n".join(lines), (turn,), values, asked / max(1, size - 1))

        return fit(build, count, tokens, least=3)
