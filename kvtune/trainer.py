"""Trainer: the layers of a recipe trained one by one, each saved when it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvtune.calibrate import find_ropes
from kvtune.errors import IntegrityError, UsageError
from kvtune.files import canonical_json, sha256_bytes, write_atomic
from kvtune.fit import Fitter
from kvtune.lessons import lessons
from kvtune.models import fingerprint
from kvtune.policy import Policy
from kvtune.space import SIDES
from kvtune.tensors import Artifact
from kvtune.training import Course, Tensors, Trained, names, train

FOLDER, LEDGER = "training", "ledger.json"
Say = Callable[[str, int, int], None]  # stage, done, total


def trains(policies: Sequence[Policy]) -> tuple[int, ...]:
    """The layers that have something to train.

    Raises:
        UsageError: a layer that selects tokens: what its queries read is not known layer by layer.
    """
    found = tuple(i for i, policy in enumerate(policies) if any(names(i, policy)))
    for i in found:
        if policies[i].select is not None:
            raise UsageError(
                f"layer {i} selects tokens, and training knows no such layers.",
                "Leave --model out, or select.",
            )
    return found


@dataclass(frozen=True)
class Ledger:
    """The layers that are done, in a folder: a file of tensors for each, and one list of hashes.

    A list with another binding (other settings, text or model) is none of ours and is replaced.
    """

    folder: Path
    binding: str

    def load(self, layer: int) -> Trained | None:
        """A layer that is done; None when it is not.

        Raises:
            IntegrityError: a file has changed since it was written.
        """
        row = self._rows().get(str(layer))
        if row is None:
            return None
        tensors = Artifact.load(self._file(layer), row["sha256"]).tensors
        return Trained(tensors, row["before"], row["after"])

    def save(self, layer: int, trained: Trained) -> None:
        """Writes a layer's tensors, then its row."""
        sha256 = Artifact(trained.tensors).save(self._file(layer))
        row = {"sha256": sha256, "before": trained.before, "after": trained.after}
        whole = {"binding": self.binding, "layers": {**self._rows(), str(layer): row}}
        write_atomic(self.folder / LEDGER, json.dumps(whole, indent=1).encode())

    def _rows(self) -> dict[str, Any]:
        file = self.folder / LEDGER
        if not file.is_file():
            return {}
        try:
            held = json.loads(file.read_text())
            rows: dict[str, Any] = held["layers"] if held["binding"] == self.binding else {}
            assert all(row.keys() == {"sha256", "before", "after"} for row in rows.values())
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            what = f"{file} is damaged."
            raise IntegrityError(what, f"Delete {self.folder} and fit again.") from None
        return rows

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains what a recipe's codecs train, from their fit to a profile."""

    model: Any
    tokens: Tensor  # [N, C + M + 1] of calibration text
    context: int  # C
    fitter: Fitter
    folder: Path
    course: Course

    def run(self, policies: Sequence[Policy], say: Say) -> dict[int, Trained]:
        """Trains each layer that is not done already.

        Raises:
            UsageError: a layer that cannot be trained, or more tokens than the model's positions.
            IntegrityError: a layer that was done has changed since.
        """
        wanted = trains(policies)
        starts = {i: self.fitter.layer(i, policies[i]) for i in wanted}
        ledger = Ledger(self.folder / FOLDER, self._binding(policies, starts))
        found = {i: done for i in wanted if (done := ledger.load(i)) is not None}
        left = [i for i in wanted if i not in found]
        if not left:
            return found
        say("dense pass", 0, 1)
        seen = lessons(self.model, self.tokens, self.context, self.course.seed, left)
        say("dense pass", 1, 1)
        ropes = find_ropes(self.model)
        say("training layers", 0, len(left))
        for count, i in enumerate(left, 1):
            refit = self._refit(i, policies[i])
            lesson = seen.pop(i)
            found[i] = train(i, policies[i], starts[i], lesson, ropes.get(i), self.course, refit)
            ledger.save(i, found[i])
            say("training layers", count, len(left))
        return dict(sorted(found.items()))

    def _refit(self, layer: int, policy: Policy) -> Callable[[Tensors], Tensors]:
        def refit(held: Tensors) -> Tensors:
            found: Tensors = {}
            for side in SIDES:
                stem = f"layer.{layer}.{side}."
                own = {k.removeprefix(stem): x for k, x in held.items() if k.startswith(stem)}
                chain = getattr(policy, side)
                fitted = self.fitter.around(layer, side, chain.codecs, own) if own else {}
                found |= {stem + name: x for name, x in fitted.items()}
            return found

        return refit

    def _binding(self, policies: Sequence[Policy], starts: Mapping[int, Tensors]) -> str:
        """Hash of all that a trained layer depends on."""
        begun = {
            name: sha256_bytes(x.contiguous().numpy().tobytes())
            for own in starts.values()
            for name, x in own.items()
        }
        told = {
            "policies": [policies[i].model_dump() for i in starts],
            "model": fingerprint(self.model),
            "dtype": str(self.model.dtype),
            "tokens": sha256_bytes(self.tokens.cpu().numpy().tobytes()),
            "context": self.context,
            "course": asdict(self.course),
            "starts": begun,
        }
        return sha256_bytes(canonical_json(told).encode())
