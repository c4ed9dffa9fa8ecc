"""Profile: what calibrate measured on a model, in one
safetensors file that any recipe search can use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtune.chains import Chain
from kvtune.errors import IntegrityError
from kvtune.files import canonical_json
from kvtune.retention import Selector
from kvtune.space import Side
from kvtune.tensors import Artifact

# what is written, and what was before there were seals: no flipped bit leads from one to the other
FORMAT, UNSEALED = 4, 1
SEAL = "seal"


@dataclass(frozen=True)
class Cell:
    """One row of the price table: one side of one layer under one setting, the other side dense;
    of all tokens, or of those that a selector keeps (then keys may be dense as well)."""

    layer: int
    side: Side
    setting: str  # canonical JSON of the chain's tables
    sinks: int
    recent: int
    select: str = ""  # canonical JSON of the selector's table; empty where all tokens stay

    @property
    def row(self) -> list[int | str]:
        """As it stands in a file, where what keeps all tokens says nothing of them."""
        plain = [self.layer, self.side, self.setting, self.sinks, self.recent]
        return [*plain, self.select] if self.select else plain


@dataclass(frozen=True, eq=False)
class Profile:
    """Named tensors and what they were measured on.

    prices [cells] and prices_by_head [cells, H] in nats; exact [cells] where `--exact` was asked;
    errors [layers, key settings, value settings, 4] are KVTuner's e_k, e_v, e_a, e_o;
    moments.{keys,values,queries} [L, H, D, D], means [L, H, D] and samples [L, H, n, D] of pre-RoPE
    keys and queries and of values, joint.{keys,values} of all heads at once, cached.* as they are
    cached (see `moments`), moments.outputs and moments.pulls of attention;
    mass.{sinks,recent,entropy,coverage90} [L, Hq]; tokens.* are what budgets of tokens go by (see
    `occupancy`).
    """

    cells: tuple[Cell, ...]
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def prices(self) -> dict[Cell, float]:
        """KL in nats of each cell."""
        return dict(zip(self.cells, self.tensors["prices"].tolist(), strict=True))

    def prices_by_head(self) -> dict[Cell, tuple[float, ...]]:
        """KL in nats of each cell's kv heads, scaled so that they add up to the cell's.

        Heads alone leave out what their errors do together, so that their plain sum differs.
        """
        split = self.tensors["prices_by_head"].double()
        part = split / split.sum(1, keepdim=True).clamp_min(1e-30)
        rows = (part * self.tensors["prices"].double()[:, None]).tolist()
        return {cell: tuple(row) for cell, row in zip(self.cells, rows, strict=True)}

    def save(self, path: Path) -> str:
        """Writes the file atomically; returns its sha256."""
        cells = [cell.row for cell in self.cells]
        meta: dict[str, Any] = {"profile": FORMAT, "cells": cells, **self.meta}
        return Artifact(self.tensors, {**meta, SEAL: _seal(self.tensors, meta)}).save(path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a profile.

        Raises:
            MissingInputError: no such file.
            IntegrityError: damaged, too new, or not a profile.
        """
        artifact = Artifact.load(path)
        meta = dict(artifact.meta)
        seal = meta.pop(SEAL, None)
        if meta.get("profile") != UNSEALED and seal != _seal(artifact.tensors, meta):
            again = "Delete it and run: kvtune calibrate MODEL"
            raise IntegrityError(f"{path} has changed since it was written.", again)
        version, cells = meta.pop("profile", None), meta.pop("cells", None)
        if version not in range(UNSEALED, FORMAT + 1) or not isinstance(cells, list):
            raise IntegrityError(
                f"{path} is not a profile of format {FORMAT}.", "Run: kvtune calibrate MODEL"
            )
        try:
            return cls(tuple(Cell(*cell) for cell in cells), artifact.tensors, meta)
        except TypeError as error:
            raise IntegrityError(
                f"{path} holds malformed cells: {error}.", "Run: kvtune calibrate MODEL"
            ) from None


def _seal(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Hash of all that a profile says, so that a changed byte is found."""
    facts = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
    total = hashlib.sha256(canonical_json([facts, dict(meta)]).encode())
    for name in sorted(tensors):
        total.update(tensors[name].contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def setting(chain: Chain) -> str:
    """The canonical text of a chain."""
    return json.dumps(chain.tables(), sort_keys=True, separators=(",", ":"))


def selected(select: Selector | None) -> str:
    """The canonical text of a selector; empty for none."""
    if select is None:
        return ""
    return json.dumps(select.table(), sort_keys=True, separators=(",", ":"))
