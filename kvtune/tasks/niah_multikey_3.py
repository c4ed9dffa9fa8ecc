"""Finds one long code among many by another code (RULER, arXiv:2404.06654)."""

import random
import uuid

from kvtune.task import Count, Item, Task, Turn, fit


class NiahMultikey3(Task):
    """One code of 32 hex digits among many, asked for by another such code."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """The haystack is needles, uuid to uuid; one of them is asked for."""
        seed = rng.random()

        def build(size: int) -> Item:
            own = random.Random(seed)
            place = own.random()
            codes = [str(uuid.UUID(int=own.getrandbits(128), version=4)) for _ in range(2 * size)]
            asked, values = int(place * size), codes[1::2]
            lines = [
                f"The special code of {key} is {value}."
                for key, value in zip(codes[::2], values, strict=True)
            ]
            key = codes[2 * asked]
            question = (
                f"\n\nQuestion: What is the special code of {key}?"
                f"\nAnswer: The special code of {key} is"
            )
            turn = Turn(question, (values[asked],), 40)
            return Item("\n".join(lines), (turn,), values, asked / max(1, size - 1))

        return fit(build, count, tokens, least=2)
