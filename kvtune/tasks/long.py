"""Writes on at length, as the dense model would: errors that add up show here first."""

import random

from kvtune.haystack import sentences
from kvtune.task import Count, Item, Task, Turn, fit

NEW = 128


class Long(Task):
    """Long generation: the share of words before the first that the dense model says otherwise."""

    averaged = False  # one flipped word ends the agreement, however good the rest is
    follows_dense = True

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """Prose to go on with; the reference is the dense model's own answer."""
        lines = sentences(prose[:200_000]) or ["A story begins."]
        start = rng.randrange(len(lines))

        def build(size: int) -> Item:
            around = [lines[(start + place) % len(lines)] for place in range(size)]
            question = "\n\nIn summary, the text above explains the following."
            return Item(" ".join(around), (Turn(question, (), NEW),))

        return fit(build, count, tokens)

    def score(self, text: str, item: Item) -> float:
        """The agreeing words at the start, as a share of the dense answer's."""
        wanted = item.references[0].split() if item.references else []
        said = text.split()
        same = 0
        while same < min(len(wanted), len(said)) and wanted[same] == said[same]:
            same += 1
        return same / len(wanted) if wanted else 0.0

    def details(self, text: str, item: Item) -> dict[str, float]:
        """Words said, and the share of three-word runs that were said before."""
        said = text.split()
        runs = list(zip(said, said[1:], said[2:], strict=False))
        repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
        return {"words": float(len(said)), "repetition": repeated}
