"""Goal: what a search is for: its objectives, the limits it keeps to, and the cache it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtune.errors import UsageError, suggest

OBJECTIVES = ("memory", "accuracy", "latency")
USUAL = ("memory", "accuracy")


@dataclass(frozen=True)
class Bounds:
    """What a recipe must keep to; None does not bound."""

    max_bytes: int | None = None
    max_kl: float | None = None  # nats, on the search text
    max_latency: float | None = None  # microseconds of attention per decoded token, all layers
    min_ratio: float | None = None  # times smaller than the 16-bit cache

    def excess(self, values: Mapping[str, float]) -> dict[str, float]:
        """By how much known values ("bytes", "ratio", "latency", "kl") break each limit.

        Numbers above zero break theirs; a value that is not known yet is left out.
        """
        upper = {"bytes": self.max_bytes, "kl": self.max_kl, "latency": self.max_latency}
        found = {
            name: values[name] - limit
            for name, limit in upper.items()
            if limit is not None and name in values
        }
        if self.min_ratio is not None and "ratio" in values:
            found["ratio"] = self.min_ratio - values["ratio"]
        return found

    def table(self) -> dict[str, float]:
        """The limits that were given."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


@dataclass(frozen=True)
class Goal:
    """Objectives, all minimised, and the context length and batch that bytes and times are for."""

    objectives: tuple[str, ...] = USUAL
    context: int = 32768
    batch: int = 1
    bounds: Bounds = field(default_factory=Bounds)
    budgets: int = 18  # points of the surrogate front that every search measures
    rivals: int = 12  # uniform recipes that meet it on held-out text; a third is searched too
    clusters: int = 4  # per side
    within: tuple[float, ...] = ()  # true bits per value: the best recipe within each is proved

    @property
    def timed(self) -> bool:
        """Whether latencies are asked for."""
        return "latency" in self.objectives or self.bounds.max_latency is not None

    @classmethod
    def parse(
        cls,
        objectives: str,
        context: int,
        batch: int,
        bounds: Bounds | None = None,
        within: str = "",
    ) -> Goal:
        """Reads `memory,accuracy,latency`, any of them in any order, and `within` as "2,2.5,3";
        UsageError for others."""
        wanted = tuple(word.strip() for word in objectives.split(","))
        for word in wanted:
            if word not in OBJECTIVES:
                raise UsageError(f"There is no objective {word!r}.", suggest(word, OBJECTIVES))
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"--objective {objectives} names one twice.", "Give each once.")
        bounds = bounds or Bounds()
        _bounded(wanted, bounds)
        return cls(wanted, context, batch, bounds, within=_bits(within))


def _bits(words: str) -> tuple[float, ...]:
    """Reads true bits per value, such as "2,2.5,3"."""
    try:
        found = tuple(float(word) for word in words.split(",")) if words else ()
    except ValueError:
        found = (0.0,)
    if not all(0 < bits <= 16 for bits in found) or len(set(found)) < len(found):
        raise UsageError(
            f"--bits {words} is no list of true bits per value.", "Give for example --bits 2,2.5,3."
        )
    return tuple(sorted(found))


def _bounded(wanted: tuple[str, ...], bounds: Bounds) -> None:
    """Refuses goals whose best recipe is known without a search."""
    sized = bounds.max_bytes is not None or bounds.min_ratio is not None
    if wanted == ("accuracy",) and not sized and bounds.max_latency is None:
        hint = "Add memory, or a limit: --max-bytes, --min-ratio or --max-latency."
        raise UsageError("Accuracy alone is best without any compression.", hint)
    if "accuracy" not in wanted and bounds.max_kl is None:
        hint = "Add accuracy, or a limit: --max-kl."
        raise UsageError("Without accuracy the smallest codes are best, whatever they say.", hint)
