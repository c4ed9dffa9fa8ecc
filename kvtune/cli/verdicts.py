"""Verdicts: one gate each, with what was measured, what is allowed, and how much room is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtune.cli import amounts

if TYPE_CHECKING:
    from kvtune.baseline import Baseline, Evidence
    from kvtune.cli.faults import Fault
    from kvtune.prove import Proof

HEADS = ("gate", "value", "limit", "margin", "95 % interval", "verdict")


@dataclass(frozen=True)
class Verdict:
    """One gate; a baseline's gates on quality judge the difference from it."""

    gate: str
    value: float
    limit: float
    margin: float  # below zero when the gate fails
    interval: tuple[float, float] | None
    passed: bool

    @classmethod
    def of(
        cls,
        gate: str,
        value: float,
        limit: float,
        interval: tuple[float, float] | None = None,
        least: bool = False,
    ) -> Verdict:
        """Judges a value that may not exceed a limit, or with `least` not fall below it."""
        margin = value - limit if least else limit - value
        return cls(gate, value, limit, margin, interval, margin >= 0)

    def shown(self, value: float) -> str:
        """A number of this gate in its unit."""
        if self.gate.endswith(("flips", "drop")):
            return f"{value:.2%}"
        if self.gate.endswith("bytes"):
            return amounts.size(value)
        return f"{value:.2f}x" if self.gate.endswith("ratio") else f"{value:.5f}"

    def cells(self) -> list[str]:
        """The texts of a row under HEADS."""
        numbers = [self.shown(x) for x in (self.value, self.limit, self.margin)]
        ends = " to ".join(self.shown(x) for x in self.interval or ())
        return [self.gate, *numbers, ends, "ok" if self.passed else "FAILED"]

    def sentence(self) -> str:
        """The verdict in words."""
        gate, value, limit, margin, ends, verdict = self.cells()
        among = f", 95 % interval {ends}" if ends else ""
        return f"{gate} {verdict}: {value}, limit {limit}, margin {margin}{among}"


@dataclass
class Report:
    """What a call of `kvtune apply` found, for the files of a CI system."""

    recipe: str
    model: str
    verdicts: list[Verdict] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # the numbers of the proof, in words
    seconds: float = 0.0
    fault: Fault | None = None  # why nothing was measured

    @property
    def failed(self) -> list[Verdict]:
        """The gates that were missed."""
        return [verdict for verdict in self.verdicts if not verdict.passed]


def against(
    baseline: Baseline, proof: Proof, evidence: Evidence, slack: float
) -> tuple[Verdict, Verdict, Verdict]:
    """Holds a proof to a baseline: KL and flips within chance, bytes within `slack`, a share."""
    kl, flips = baseline.differences(proof, evidence)
    most = baseline.proof.bytes * (1 + slack)
    return (
        Verdict.of("baseline-kl", kl.value, kl.allowed, kl.interval),
        Verdict.of("baseline-flips", flips.value, flips.allowed, flips.interval),
        Verdict.of("baseline-bytes", proof.bytes, most),
    )
