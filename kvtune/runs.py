"""A run folder: the profile, the study, the proved front and
the chosen recipe, written so that a kill leaves no half."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvtune.errors import IntegrityError
from kvtune.files import canonical_json, sha256_bytes, write_atomic

PROFILE, STUDY, TRIALS = "profile.safetensors", "study.db", "trials.json"
FRONT, CHOSEN, SUMMARY = "front", "chosen", "tune.json"
MEASURED = (
    "bytes",
    "bits",
    "ratio",
    "kl",
    "flips",
    "dnll",
    "projects",
    "latency",
    "predicted",
    "few_kl",
    "error",
)


def binding(**inputs: Any) -> str:
    """Hash of everything that a result depends on."""
    return sha256_bytes(canonical_json(inputs).encode())


def write_summary(folder: Path, bound: str, summary: Mapping[str, Any]) -> None:
    """Writes what a finished run found; the last file of a run."""
    text = json.dumps({"binding": bound, **summary}, indent=1)
    write_atomic(folder / SUMMARY, text.encode())


class Trial(Protocol):
    """A row of a study, as it is written down."""

    @property
    def number(self) -> int: ...
    @property
    def origin(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def memo_of(self) -> int | None: ...
    @property
    def attrs(self) -> Mapping[str, float | str]: ...


def write_trials(folder: Path, objectives: Sequence[str], rows: Iterable[Trial]) -> None:
    """Writes all rows of a study in plain words, predicted beside measured, wherever it lives."""
    table = [
        {
            "number": row.number,
            "origin": row.origin,
            "state": row.state,
            "memo_of": row.memo_of,
            **{name: row.attrs.get(name) for name in MEASURED},
        }
        for row in rows
    ]
    text = json.dumps({"objectives": list(objectives), "rows": table}, indent=1)
    write_atomic(folder / TRIALS, text.encode())


def read_summary(folder: Path, bound: str) -> dict[str, Any] | None:
    """Returns the summary of a finished run of the same inputs,
    if the recipes it names are all there."""
    file = folder / SUMMARY
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text())
    except ValueError:
        raise IntegrityError(
            f"{file} is damaged.", f"Delete {file} and run the command again."
        ) from None
    if held.get("binding") != bound:
        return None
    there = all((folder / point["file"]).is_file() for point in held["points"])
    return dict(held) if there else None


def clear_front(folder: Path) -> None:
    """Removes an earlier front's recipes."""
    for pattern in ("*.toml", "*.safetensors"):
        for stale in (folder / FRONT).glob(pattern):
            stale.unlink()


def card(
    name: str, base_model: str, points: list[dict[str, Any]], chosen: int, command: str
) -> str:
    """The README of a shared recipe folder: a model card with the measured table."""
    rows = "\n".join(_row(point, index == chosen) for index, point in enumerate(points))
    first = points[chosen]
    return f"""---
library_name: kvtune
base_model: {base_model}
tags: [kv-cache, kvtune]
---
# {name}

A KV-cache recipe for {base_model}: {first["bits"]:.2f} true bits per cached value,
{first["ratio"]:.2f} times smaller than the 16-bit cache at {first["bytes_context"]:,} tokens, KL
{first["kl"]:.4f} nats on held-out text.

    cache = kvtune.load("{name}", model)
    model.generate(**inputs, past_key_values=cache)

The front it was chosen from, measured by generation on {first["positions"]:,} held-out positions
after contexts of {first["context"]:,} tokens (95 % bootstrap intervals over sequences):

| true bits | smaller | KL, nats | flips |
|---|---|---|---|
{rows}

Made by `{command}`.
"""


def _row(point: Mapping[str, Any], chosen: bool) -> str:
    cells = (
        f"{point['bits']:.2f}{' (this one)' if chosen else ''}",
        f"{point['ratio']:.2f}x",
        f"{point['kl']:.4f} ({point['kl_low']:.4f} to {point['kl_high']:.4f})",
        f"{100 * point['flips']:.1f} %",
    )
    return f"| {' | '.join(cells)} |"
