"""Names the words that are most common in a list (RULER, arXiv:2404.06654)."""

import random

from kvtune.haystack import words
from kvtune.task import Count, Item, Task, Turn, fit

COMMON = 10
SHORT = 4096  # below this many tokens words are repeated less often


class Cwe(Task):
    """The ten words that stand in a numbered list far more often than the others."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """A worked example of 40 words where there is room for it, then the list."""
        seed = rng.random()
        often, seldom = (6, 1) if tokens < SHORT else (30, 3)

        def build(size: int) -> Item:
            own = random.Random(seed)
            drawn = words(own, COMMON + size)
            common, others = drawn[:COMMON], drawn[COMMON:]
            context = _example(own) if tokens >= SHORT else ""
            context += _list(own, common * often + others * seldom)
            return Item(context, (Turn(_question(), tuple(common), 120),), drawn)

        return fit(build, count, tokens, least=COMMON)


def _example(rng: random.Random) -> str:
    drawn = words(rng, 40)
    common, others = drawn[:COMMON], drawn[COMMON:]
    solved = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
    return f"{_list(rng, common * 10 + others * 3)}{_question()} {solved}\n\n"


def _list(rng: random.Random, chosen: list[str]) -> str:
    rng.shuffle(chosen)
    return " ".join(f"{place}. {word}" for place, word in enumerate(chosen, 1))


def _question() -> str:
    return (
        f"\nQuestion: Which {COMMON} words are the most common in the list above?"
        f"\nAnswer: The {COMMON} most common words of the list are:"
    )
