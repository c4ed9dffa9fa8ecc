"""A verb: a function whose bundles of options become options of the command line."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, get_type_hints

import typer

from kvtune.cli.options import Manners
from kvtune.cli.output import perform

Work = Callable[..., None]


def add(app: typer.Typer, work: Work, name: str, schema: str = "") -> None:
    """Registers `work(out, ...)` as a verb: parameters that are bundles are taken apart.

    Args:
        schema: the verb's name in --json, when it is not `name`.
    """
    hints = get_type_hints(work, include_extras=True)
    own = list(inspect.signature(work).parameters.values())[1:]
    bundles = {p.name: hints[p.name] for p in own if is_dataclass(hints[p.name])}

    def called(**given: Any) -> None:
        manners = _packed(Manners, given)
        packed = {bundle: _packed(kind, given) for bundle, kind in bundles.items()}
        code = perform(schema or name, manners, partial(work, **given, **packed))
        raise typer.Exit(code)

    plain = [_keyword(p.name, hints[p.name], p.default) for p in own if p.name not in bundles]
    taken = [p for kind in (*bundles.values(), Manners) for p in _taken_apart(kind)]
    called.__signature__ = inspect.Signature([*plain, *taken])  # type: ignore[attr-defined]
    called.__annotations__ = {}
    called.__doc__ = work.__doc__
    app.command(name)(called)


def _taken_apart(kind: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        yield _keyword(one.name, hints[one.name], one.default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY  # in any order, with or without a default
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _packed(kind: Any, given: dict[str, Any]) -> Any:
    return kind(**{one.name: given.pop(one.name) for one in fields(kind)})
