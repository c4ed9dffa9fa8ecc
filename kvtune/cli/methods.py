"""kvtune methods: all methods found, or one of them with its settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.output import Output

if TYPE_CHECKING:
    from kvtune.parts import Part

Name = Annotated[str, typer.Argument(metavar="NAME", help="One method, with its settings.")]


def methods(out: Output, name: Name = "") -> None:
    """List the methods that recipes are made of, or show one of them."""
    from kvtune import parts
    from kvtune.reading import reading

    if name:
        return _show_one(out, parts.find(name))
    found = [parts.find(known) for known in parts.names()]
    rows = [
        {"name": p.name(), "kind": p.kind, "gpu": reading(p), "summary": _summary(p)} for p in found
    ]
    out.data["methods"] = rows
    table = Table(box=SIMPLE_HEAD)
    for column in ("method", "kind", "on a GPU", "what it does"):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)


def _summary(part: type[Part]) -> str:
    """The first line of the method's file, which says what it is for."""
    module = inspect.getmodule(part)
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _show_one(out: Output, part: type[Part]) -> None:
    settings = [_setting(part, name) for name in part.model_fields]
    about = inspect.getdoc(part) or ""
    head = {"name": part.name(), "kind": part.kind, "summary": _summary(part)}
    out.data |= {**head, "about": about, "needs": sorted(part.needs), "settings": settings}
    table = Table(box=SIMPLE_HEAD)
    for column in ("setting", "default", "legal values"):
        table.add_column(column)
    for row in settings:
        table.add_row(row["name"], str(row["default"]), ", ".join(map(str, row["legal"])) or "any")
    out.print(f"{part.name()} ({part.kind}): {_summary(part)}", "", about, table)


def _setting(part: type[Part], name: str) -> dict[str, Any]:
    from kvtune import parts

    field = part.model_fields[name]
    try:
        legal = list(parts.legal_values(part, name))
    except ValueError:  # without a mark that bounds it
        legal = []
    default = None if field.is_required() else field.default
    return {"name": name, "default": default, "legal": legal}
