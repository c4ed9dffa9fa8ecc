"""kvtune recipe: read, check, compare and import recipes without loading a model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts, spelled
from kvtune.cli.options import USUAL_KL, Count, RecipeName
from kvtune.cli.output import Output
from kvtune.errors import IntegrityError, MissingInputError

if TYPE_CHECKING:
    from kvtune.recipe import Recipe

Layers = Annotated[
    int | None, typer.Option(min=1, help="Layers to spell out when no recipe names a model; 32.")
]

Preset = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="KVTuner's YAML of bits for each layer; its name tells model and mode.",
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(help="kivi or pertoken, when the file's name does not say it."),
]
Written = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the recipe here; it is printed when left out."
    ),
]


def show(out: Output, recipe: RecipeName, count: Count) -> None:
    """Show what RECIPE does to each span of layers, and what it stores."""
    from kvtune import shipped

    path, read = _read(recipe)
    spans = [{"span": entry.span, **spelled.policy(entry)} for entry in read.layers]
    spans = spans or [{"span": "all", **spelled.DENSE}]
    bound = read.model.model_dump() if read.model else None
    out.data |= {
        **_head(recipe, path, read),
        "model": bound,
        "spans": spans,
        "measured": read.measured,
        "shipped": recipe in shipped.names(),
        "prefill": _prefill(read),
    }
    title = " ".join(filter(None, (f"{read.name or recipe}:", read.description)))
    out.print(title, *([f"Tuned for {read.model.name}."] if read.model else []), _spans(spans))
    if read.shortener:
        out.print(f"Prompts are cut before they are read, by a draft model: {read.shortener}.")
    if read.model and not read.is_open():
        at = count.bytes_at or int(read.measured.get("bytes_context", 32768))
        found = spelled.weight(read.model, read, at, count.batch)
        out.data["stored"] = found
        out.print(
            f"{found['bits']:.2f} true bits per value: {amounts.size(found['bytes'])}, "
            f"{found['ratio']:.2f}x smaller than 16 bit, at {at:,} tokens, batch {count.batch}."
        )
    if told := [f"{name} {value:g}" for name, value in spelled.numbers(read).items()]:
        out.print(f"Measured: {', '.join(told)}.")


def _prefill(read: Recipe) -> str | None:
    """What cuts a prompt, in words; nothing where it is read whole."""
    return None if read.shortener is None else str(read.shortener)


def check(out: Output, recipe: RecipeName) -> None:
    """Check RECIPE: every key and value, its spans, and the tensors beside it."""
    path, read = _read(recipe)
    kind = _kind(read)
    out.data |= _head(recipe, path, read)
    if read.model and not read.is_open():
        spelled.weight(read.model, read, 4096, 1)  # the settings must fit the model's heads
    tensors = _check_tensors(path, read)
    out.data["tensors"] = tensors
    beside = f", with {tensors} sound tensors" if read.artifact else ""
    out.print(f"{path} is a sound {kind}{beside}.")


def diff(out: Output, left: RecipeName, right: RecipeName, layers: Layers = None) -> None:
    """Compare two recipes: layers that differ, and measured numbers side by side."""
    (_, a), (_, b) = _read(left), _read(right)
    count = spelled.layer_count(a, b, layers)
    found = spelled.differences(a, b, count)
    numbers = {"left": spelled.numbers(a), "right": spelled.numbers(b)}
    out.data |= {"left": left, "right": right, "layers": found, "measured": numbers}
    out.data["prefill"] = {"left": _prefill(a), "right": _prefill(b)}
    if not found:
        out.print("The recipes treat every layer alike.")
    if a.prefill != b.prefill:
        out.print(
            f"prefill: {_prefill(a) or 'whole'} in {left}, {_prefill(b) or 'whole'} in {right}."
        )
    for one in found:
        table = Table(title=f"layers {one['layers']}", box=SIMPLE_HEAD, title_justify="left")
        for column in ("", left, right):
            table.add_column(column)
        for key, value in one["left"].items():
            if value != one["right"][key]:
                table.add_row(key, value, one["right"][key])
        out.print(table)
    if names := list(dict.fromkeys([*numbers["left"], *numbers["right"]])):
        out.print(_measured(left, right, numbers, names))


def schema(out: Output) -> None:
    """Print the JSON Schema of recipes, with every method found."""
    from kvtune.recipe import schema as of_recipes

    out.data["schema"] = of_recipes()
    out.print(json.dumps(out.data["schema"], indent=1))


def list_(out: Output) -> None:
    """List the recipes and templates that come with kvtune."""
    from kvtune import shipped

    rows = []
    for name in shipped.names():
        _, read = _read(name)
        rows.append({"name": name, "kind": _kind(read), "description": read.description})
    out.data["recipes"] = rows
    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "kind", "what it does"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    out.print(table)


def kvtuner_yaml(out: Output, file: Preset, output: Written = None, mode: Mode = None) -> None:
    """Make a recipe of a per-layer or per-head preset of KVTuner (arXiv:2502.04420)."""
    from kvtune.kvtuner import read

    preset = read(file, mode)
    made = preset.recipe()
    out.data |= {
        "source": str(file),
        "recipe": str(output) if output else None,
        "name": made.name,
        "description": made.description,
        "model": preset.model,
        "mode": preset.mode,
        "layers": len(preset.layers),
        "per_head": preset.per_head,
        "payload_bits": preset.payload_bits,
        "toml": made.dumps(),
    }
    if output is None:
        out.note(made.description)
        out.print(made.dumps().removesuffix("\n"))
        return
    made.save(output)
    spans = [{"span": entry.span, **spelled.policy(entry)} for entry in made.layers]
    out.print(made.description, _spans(spans))
    out.print(f"Written to {output}. It is bound to no model, so prove it on yours:")
    proof = ["kvtune", "apply", str(output), "--model", "MODEL", "--max-kl", str(USUAL_KL)]
    out.print(shlex.join(proof))


VERBS: dict[str, Callable[..., None]] = {
    "show": show,
    "check": check,
    "diff": diff,
    "schema": schema,
    "list": list_,
}
IMPORTS: dict[str, Callable[..., None]] = {"kvtuner-yaml": kvtuner_yaml}


def _read(argument: str) -> tuple[Path, Recipe]:
    from kvtune import shipped
    from kvtune.recipe import load

    path = shipped.find(argument)
    return path, load(path)


def _kind(read: Recipe) -> str:
    return "template" if read.is_open() else "recipe"


def _head(argument: str, path: Path, read: Recipe) -> dict[str, Any]:
    about = {"name": read.name or path.stem, "description": read.description}
    return {"recipe": argument, "kind": _kind(read), **about}


def _check_tensors(path: Path, read: Recipe) -> int:
    from kvtune.tensors import Artifact

    if read.artifact is None:
        return 0
    file = path.parent / read.artifact.file
    try:
        return len(Artifact.load(file, read.artifact.sha256).tensors)
    except MissingInputError as error:
        what = f"{path} needs {read.artifact.file} beside it: {error.what}"
        raise IntegrityError(what, "Fetch the whole folder again.") from error


def _spans(spans: list[dict[str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("layers", "exact tokens", "keys", "values"):
        table.add_column(column)
    for span in spans:
        table.add_row(*span.values())
    return table


def _measured(
    left: str, right: str, numbers: dict[str, dict[str, float]], names: list[str]
) -> Table:
    table = Table(title="measured", box=SIMPLE_HEAD, title_justify="left")
    for column in ("", left, right):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        cells = [numbers[side].get(name) for side in ("left", "right")]
        table.add_row(name, *("" if cell is None else f"{cell:g}" for cell in cells))
    return table
