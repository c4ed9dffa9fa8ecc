"""Names the three most frequent words of a coded text (RULER, arXiv:2404.06654)."""

import random
import string

from kvtune.task import Count, Item, Task, Turn, fit

ALPHA, ASKED = 2.0, 3
ZETA = 1.6449340668482264  # zeta(2), so that the counts of all ranks add up to the length
NOISE = "..."


class Fwe(Task):
    """The three most frequent words of a text in made-up words, whose counts fall as 1/rank^2."""

    def make(self, rng: random.Random, count: Count, tokens: int, prose: str) -> Item:
        """Rank 1 is noise; ranks 2 to 4 are asked for."""
        seed = rng.random()

        def build(size: int) -> Item:
            own = random.Random(seed)
            vocabulary = _words(own, max(2 * ASKED, size // 50))
            counts = [max(1, int(size * rank**-ALPHA / ZETA)) for rank in range(2, size + 2)]
            text = [NOISE] * int(size / ZETA)
            for word, times in zip(vocabulary, counts, strict=False):
                text += [word] * times
            own.shuffle(text)
            question = (
                "\nQuestion: Which three words are the most frequent in the coded text above?"
                "\nAnswer: The three most frequent words are:"
            )
            turn = Turn(question, tuple(vocabulary[:ASKED]), 50)
            return Item("Coded text: " + " ".join(text), (turn,), vocabulary)

        return fit(build, count, tokens, least=64)


def _words(rng: random.Random, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in found:
            found.append(word)
    return found
