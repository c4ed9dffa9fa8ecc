"""Words, numbers and fillers that tasks are made of, drawn from a seeded generator."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

# easy words that most tokenizers keep whole, so that a key is a few tokens long
_NOUNS = (
    "apple arrow basket beach bell bird boat bone book bottle branch bread brick bridge brush "
    "bucket button cabin cable cake camera candle canyon carpet castle chain chair cherry circle "
    "clock cloud coat coin copper corn cotton crown cup desk diamond door dragon drum eagle engine "
    "farm feather fence field flag flower forest fork fountain frame garden gate glass glove goat "
    "grape grass hammer harbor hat helmet hill honey horse hotel island jacket jewel kettle key "
    "kitchen kite knife ladder lake lamp leaf lemon letter library lion magnet map market mask "
    "meadow mirror moon mountain mouse museum needle nest ocean olive onion orange oven owl paint "
    "palace paper parade pearl pencil pepper piano picture pillow pipe plate pocket pond potato "
    "puzzle queen rabbit radio rain ribbon ring river road robot rocket roof root rope rose saddle "
    "salt school scissors shell ship shirt shoe silver snow soap soup spider spoon spring square "
    "stable stamp star statue stone storm stove sugar sword table temple tent theater thread tiger "
    "tower toy train tree trumpet tunnel turtle umbrella valley village violin wagon wall watch "
    "water wheel whistle window winter wire wolf wood yard zebra"
)
_ADJECTIVES = (
    "ancient angry bitter black blue bold brave bright broken brown calm clean clever cold crisp "
    "curly dark deep distant dry dusty early empty fancy fast flat fresh gentle giant golden grand "
    "gray green happy heavy hidden hollow honest hungry icy jolly kind large lazy light little "
    "local lonely long loud lucky mighty modern narrow new noble noisy odd old pale plain polite "
    "proud quick quiet rapid rare red rich rough round royal rusty secret shallow sharp shiny "
    "short silent simple sleepy slow small smooth soft solid sour square steady steep strange "
    "strong sunny sweet tall tender thick thin tiny tired warm wet white wide wild wise wooden "
    "yellow young"
)
NOUNS, ADJECTIVES = _NOUNS.split(), _ADJECTIVES.split()

# fillers that say nothing that is ever asked for
FILLER = (
    "The fields lie still in the pale light.",
    "A cart rolls by, and its wheels creak.",
    "Somewhere a dog barks and falls silent.",
    "Clouds drift on over the low hills.",
    "Nothing else moves until the evening.",
)
NUMBERS = range(1_000_000, 10_000_000)  # seven digits


def keys(rng: random.Random, count: int) -> list[str]:
    """Draws `count` different keys, such as "silent harbor"."""
    places = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in places]


def words(rng: random.Random, count: int) -> list[str]:
    """Draws `count` different words: single ones, and beyond them pairs written as one."""
    plain = list(NOUNS)
    rng.shuffle(plain)
    more = [key.replace(" ", "") for key in keys(rng, max(0, count - len(plain)))]
    return [*plain, *more][:count]


def numbers(rng: random.Random, count: int, of: range = NUMBERS) -> list[str]:
    """Draws `count` different numbers."""
    return [str(number) for number in rng.sample(of, count)]


class Numerals(Sequence[str]):
    """All numbers of a range as texts, made one at a time: what a guesser of a number has."""

    def __init__(self, of: range = NUMBERS) -> None:
        self._of = of

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [str(number) for number in self._of[index]]
        return str(self._of[index])


def filler(count: int) -> list[str]:
    """`count` sentences of filler, the same five again and again."""
    return [FILLER[place % len(FILLER)] for place in range(count)]


def hidden(rng: random.Random, sentences: list[str], needles: list[str]) -> tuple[str, float]:
    """A text with each needle between two sentences, at drawn depths of 40 even steps.

    Returns:
        The text, and the depth of the first needle.
    """
    depths = [rng.randrange(40) / 39 for _ in needles]
    placed = sorted(zip(depths, needles, strict=True), reverse=True)
    whole = list(sentences)
    for depth, needle in placed:
        whole.insert(round(depth * len(sentences)), needle)
    return " ".join(whole), depths[0]


def sentences(prose: str) -> list[str]:
    """The sentences of a text, each on one line."""
    flat = re.sub(r"\s+", " ", prose).strip()
    return [part for part in re.split(r"(?<=[.!?]) ", flat) if part]
