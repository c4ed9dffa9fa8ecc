"""Lists every pair of a table: what is read everywhere must be kept everywhere."""

import random

from kvtune.haystack import NOUNS
from kvtune.task import Count, Item, Task, Turn, fit

ASKED, LEAD = 6, 3  # entries asked for, and entries that the answer starts with
VALUES = range(100, 1000)


class Pairs(Task):
    """Extraction: six entries of a long table, in the order of the table."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """The table is `word: number` lines; a run of six is copied from a drawn entry on."""
        seed = rng.random()

        def build(size: int) -> Item:
            own = random.Random(seed)
            place, names = own.random(), own.sample(NOUNS, min(size, len(NOUNS)))
            # a second round of names carries a numeral, so that a name stands once
            labels = [f"{names[i % len(names)]}{i // len(names) or ''}" for i in range(size)]
            values = [str(own.choice(VALUES)) for _ in labels]
            rows = [f"{a}: {b}" for a, b in zip(labels, values, strict=True)]
            first = int(place * (size - LEAD - ASKED))
            lead = "\n".join(rows[first : first + LEAD])
            question = f"\n\nThe same entries again, from {labels[first]} on:\n{lead}\n"
            wanted = tuple(rows[first + LEAD : first + LEAD + ASKED])
            turn = Turn(question, wanted, 8 * ASKED)
            depth = first / max(1, size - LEAD - ASKED)
            return Item("Entries:\n" + "\n".join(rows), (turn,), rows, depth)

        return fit(build, count, tokens, least=2 * ASKED)
