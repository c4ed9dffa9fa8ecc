"""What stands in a run folder's JSON files, as far as the report reads it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    # files of a later kvtune may hold more than is read here
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Point(_Record):
    """A proved recipe of the front: sizes in bytes, KL in nats, flips as a share."""

    file: str
    label: str = ""
    origin: str = ""
    bits: float = Field(gt=0)
    bytes: float = Field(gt=0)
    ratio: float = Field(gt=0)
    kl: float
    kl_low: float
    kl_high: float
    flips: float
    held_out_kl: float
    best_uniform_kl: float | None = None
    dnll: float | None = None
    latency: float | None = None
    positions: int
    context: int
    bytes_context: int
    batch: int = 1


class Candidate(_Record):
    """A recipe measured on held-out text in one pass; latency in microseconds."""

    origin: str
    uniform: bool = False
    projects: bool = False
    axes: tuple[str, ...] = ()  # which of tokens, bits and rank it saves by
    bytes: float = Field(gt=0)
    bits: float = Field(gt=0)
    ratio: float | None = None
    kl: float
    latency: float | None = None


class Dense(_Record):
    """The 16-bit cache."""

    bytes: float = Field(gt=0)
    bits: float = Field(16.0, gt=0)
    latency: float | None = None


class Searched(_Record):
    """How the search went."""

    objectives: tuple[str, ...] = ()
    constraints: dict[str, float] = {}
    trials: int | None = None
    infeasible: int | None = None
    stopped: int | None = None
    rank_correlation: float | None = None
    interaction: dict[str, Any] | None = None


class Summary(_Record):
    """`tune.json`: the proved front, the chosen point, and what it was measured with."""

    points: tuple[Point, ...] = Field(min_length=1)
    chosen: int = Field(ge=0)
    model: str = ""
    device: str | None = None
    torch: str | None = None
    transformers: str | None = None
    python: str | None = None
    held_out: tuple[Candidate, ...] = ()
    dense: Dense | None = None
    search: Searched | None = None
    seconds: dict[str, float] = {}


class Trial(_Record):
    """One trial of the search; KL in nats on the search's text, predicted and measured."""

    number: int
    origin: str = ""
    state: str = "complete"
    bits: float | None = None
    ratio: float | None = None
    kl: float | None = None
    predicted: float | None = None
    error: str | None = None


class Trials(_Record):
    """`trials.json`."""

    rows: tuple[Trial, ...] = ()


class Estimate(_Record):
    """A mean score between 0 and 1 with its interval."""

    score: float
    low: float
    high: float


class Difference(_Record):
    """Compressed less dense, item by item."""

    mean: float
    low: float
    high: float


class Task(_Record):
    """A task's scores beside dense, on the same items."""

    chance: float = 0.0
    n: int
    dense: Estimate
    compressed: Estimate
    difference: Difference
    verdict: str = ""
    at_chance: bool = False


class Scores(_Record):
    """A file of `scores/`: what a recipe scored on tasks of one length."""

    recipe: str = ""
    length: int | None = None
    seed: int | None = None
    items: int | None = None
    tasks: dict[str, Task]
    mean: dict[str, Any] | None = None


class Words(_Record):
    """The text of a run."""

    data: str = ""
    sequences: int | None = None
    context: int | None = None


class Job(_Record):
    """`run.json`: what the folder was made from."""

    kvtune_run: Literal[1] = 1
    model: str = ""
    text: Words = Words()
    continuation: int | None = None
    seed: int | None = None
