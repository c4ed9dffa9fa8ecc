"""A baseline: an earlier proof, kept so that a later one is held to it, sequence by sequence."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter, ValidationError

from kvtune.errors import IntegrityError, MissingInputError, UsageError
from kvtune.files import write_atomic
from kvtune.prove import Proof, interval

SCHEMA = "kvtune.baseline/1"
NEGLIGIBLE = 1e-5  # nats: what the order of float32 sums changes from machine to machine
_APPLY = "kvtune.apply/1"
_AGAIN = "Write it again: kvtune apply RECIPE --model MODEL --save-baseline FILE"


@dataclass(frozen=True)
class Evidence:
    """What a proof was made on, and what each sequence gave."""

    model: str
    fingerprint: str
    texts: str  # digest of the documents
    dtype: str
    steps: int  # positions of each sequence
    rows: tuple[tuple[float, float], ...]  # mean KL in nats, and share of flips, of each sequence

    def table(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"rows": [list(row) for row in self.rows]}


@dataclass(frozen=True)
class Difference:
    """How much worse a recipe is than the baseline in one measure (below zero: better)."""

    value: float
    allowed: float  # what chance alone explains: more than this is worse
    interval: tuple[float, float] | None  # 95 %, of the value; None without pairs


@dataclass(frozen=True)
class Baseline:
    """An earlier proof and its evidence."""

    recipe: str
    proof: Proof
    evidence: Evidence

    def save(self, file: Path) -> None:
        """Writes the baseline, whole or not at all; errors as `files.write_atomic`."""
        body = {"proof": self.proof.table(), "evidence": self.evidence.table()}
        whole = {"schema": SCHEMA, "recipe": self.recipe, **body}
        write_atomic(file, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, file: Path) -> Baseline:
        """Reads what `save` wrote, or what `kvtune apply --json` printed for a proof.

        Raises:
            MissingInputError: there is no such file.
            IntegrityError: it is no baseline, or damaged.
        """
        try:
            held = json.loads(file.read_text("utf-8"), parse_constant=_refuse)
            schema = held["schema"]
            if schema == _APPLY:
                held = held["data"]
            elif schema != SCHEMA:
                raise ValueError(f"its schema is {schema!r}")
            found = TypeAdapter(cls).validate_python({name: held[name] for name in _PARTS})
            if len(found.evidence.rows) * found.evidence.steps != found.proof.positions:
                raise ValueError("its sequences are not those of its proof")
            return found
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise MissingInputError(f"No baseline {file}: {reason}.", _AGAIN) from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"{file} is no baseline, or damaged: {_reason(error)}."
            raise IntegrityError(what, _AGAIN) from None

    def check_sizes(self, context: int, steps: int, bytes_context: int, batch: int) -> None:
        """Refuses a measurement behind another context, or whose bytes count for another cache.

        Raises:
            UsageError: the first size that differs, with the option that gives it.
        """
        proof = self.proof
        pairs = (
            ("--context", proof.context, context),
            ("--continuation", self.evidence.steps, steps),
            ("--bytes-at", proof.bytes_context, bytes_context),
            ("--batch", proof.batch, batch),
        )
        for option, wanted, given in pairs:
            if wanted != given:
                what = f"The baseline was measured with {option} {wanted}, this would be {given}."
                raise UsageError(what, f"Give {option} {wanted}, or make another baseline.")

    def check_model(self, fingerprint: str) -> None:
        """Raises IntegrityError when the baseline is another model's."""
        if fingerprint != self.evidence.fingerprint:
            raise IntegrityError(
                f"The baseline is of {self.evidence.model}, whose fingerprint "
                f"{self.evidence.fingerprint[:19]}... is not this model's ({fingerprint[:19]}...).",
                "Make one for this model with --save-baseline FILE.",
            )

    def pairs_with(self, evidence: Evidence) -> bool:
        """Whether both were measured at the same positions of the same text."""
        mine = self.evidence
        return (mine.texts, mine.steps, len(mine.rows)) == (
            evidence.texts,
            evidence.steps,
            len(evidence.rows),
        )

    def differences(self, proof: Proof, evidence: Evidence) -> tuple[Difference, Difference]:
        """How much worse a proof is in KL (nats) and in flips (share).

        At the same positions the differences of whole sequences are resampled (a paired
        bootstrap): more is worse when their 95 % interval lies above zero. Else the two intervals
        are compared, which sees large changes only: more is worse when they do not meet.
        """
        if self.pairs_with(evidence):
            return self._paired(evidence, 0, NEGLIGIBLE), self._paired(evidence, 1, 0.0)
        old = self.proof
        kl = (proof.kl, proof.kl_low, old.kl, old.kl_high)
        flips = (proof.flips, proof.flips_low, old.flips, old.flips_high)
        return _apart(*kl), _apart(*flips)

    def _paired(self, evidence: Evidence, column: int, negligible: float) -> Difference:
        pairs = zip(evidence.rows, self.evidence.rows, strict=True)
        rows = [new[column] - old[column] for new, old in pairs]
        change = torch.tensor(rows, dtype=torch.float64)
        low, high = interval(change[:, None])
        value = float(change.mean())
        return Difference(value, max(value - low, negligible), (low, high))


_PARTS = ("recipe", "proof", "evidence")


def _apart(new: float, new_low: float, old: float, old_high: float) -> Difference:
    return Difference(new - old, (new - new_low) + (old_high - old), None)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return str(error).rstrip(".") or type(error).__name__
