"""The options that several verbs share, in bundles that a verb takes whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtune.cli import amounts

Options = Callable[..., Any]
USUAL_KL = 0.02  # nats: what is chosen keeps to it when nothing else is said
_model: Options = partial(typer.Option, rich_help_panel="Model")
_text: Options = partial(typer.Option, rich_help_panel="Text")
_search: Options = partial(typer.Option, rich_help_panel="Search")
_output: Options = partial(typer.Option, rich_help_panel="Output and errors")
_tokens: Options = partial(_text, parser=amounts.tokens, metavar="TOKENS")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, a GGUF folder, or demo.")
]


def shipped_names() -> list[str]:
    """For the shell's completion of RECIPE."""
    from kvtune import shipped

    return list(shipped.names())


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's file or folder, or a shipped name.",
        autocompletion=shipped_names,
    ),
]
Folder = Annotated[
    Path | None,
    _output("-o", "--output", help="The run folder; kvtune-MODEL when left out."),
]
Template = Annotated[
    str, _search("--template", help="What is opened to the search: a shipped name or a path.")
]
DryRun = Annotated[
    bool, _output("--dry-run", help="Say what would run, how long, and what is downloaded.")
]
Force = Annotated[bool, _model("--force", help="Apply another model's recipe all the same.")]
Seed = Annotated[int, _search("--seed", help="Of everything that is drawn.")]
Continuation = Annotated[
    int, _tokens("--continuation", help="Tokens measured behind each context.")
]


@dataclass(frozen=True)
class Manners:
    """How a verb speaks; every verb has these."""

    json: Annotated[bool, _output("--json", help="Print one JSON object.")] = False
    quiet: Annotated[bool, _output("-q", "--quiet", help="Show no progress.")] = False
    verbose: Annotated[bool, _output("-v", "--verbose", help="Show the libraries' logs.")] = False
    debug: Annotated[bool, _output("--debug", help="Show the traceback of an error.")] = False


@dataclass(frozen=True)
class Where:
    """How a model is loaded."""

    device: Annotated[str, _model(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, _model(help="auto, float32, bfloat16 or float16.")] = "auto"
    offline: Annotated[bool, _model("--offline", help="Never ask the network.")] = False
    device_map: Annotated[
        str, _model(metavar="MAP", help="Spread over all GPUs and the CPU: auto, balanced, ...")
    ] = ""


@dataclass(frozen=True)
class Text:
    """What text is measured on, and how much of it."""

    data: Annotated[
        str, _text(metavar="TEXT", help="builtin, text or JSONL files, or hf:NAME[:SPLIT][:FIELD].")
    ] = "builtin"
    sequences: Annotated[int, _text(min=1, help="Sequences cut out of the text.")] = 8
    context: Annotated[int, _tokens(help="Tokens of each that are cached.")] = 512


@dataclass(frozen=True)
class Aim:
    """How much is searched, and what is chosen in the end."""

    trials: Annotated[int, _search(min=1, help="Recipes that the search measures.")] = 28
    time: Annotated[
        float | None,
        _search(parser=amounts.duration, metavar="TIME", help="Search no longer: 90s, 10m."),
    ] = None
    objective: Annotated[str, _search(metavar="NAMES", help="Any of memory,accuracy,latency.")] = (
        "memory,accuracy"
    )
    max_kl: Annotated[
        float | None,
        _search(min=0, help="Keep to this KL in nats; what is chosen is the smallest within."),
    ] = None
    max_bytes: Annotated[
        int | None,
        _search(parser=amounts.size_of, metavar="SIZE", help="Keep to this cache: 20MB, 1.5GiB."),
    ] = None
    min_ratio: Annotated[
        float | None, _search(min=1, help="Keep at least this many times below 16 bits.")
    ] = None
    max_latency: Annotated[
        float | None,
        _search(
            parser=amounts.microseconds,
            metavar="TIME",
            help="Keep to this attention time of all layers per decoded token: 900us, 1.5ms.",
        ),
    ] = None
    bits: Annotated[
        str,
        _search(metavar="N,...", help="Prove the best recipe within each of these true bits."),
    ] = ""
    latency_table: Annotated[
        Path | None,
        _search(metavar="FILE", help="A table of another device; kvtune bench kernels --table."),
    ] = None

    @property
    def choose_within(self) -> float:
        """The KL in nats that a chosen recipe keeps to."""
        return USUAL_KL if self.max_kl is None else self.max_kl


@dataclass(frozen=True)
class Count:
    """The cache whose bytes are counted."""

    bytes_at: Annotated[
        int | None,
        _tokens(help="Context length at which bytes are counted; 32k, or the model's own."),
    ] = None
    batch: Annotated[int, _text(min=1, help="Sequences in the cache whose bytes count.")] = 1
