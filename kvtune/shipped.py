"""Shipped recipes and templates, and what a RECIPE argument names."""

from pathlib import Path

from kvtune.errors import MissingInputError, UsageError, suggest

_PACKAGE = Path(__file__).resolve().parent
# in a wheel they lie inside the package, in a checkout beside it
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
_FILE = "recipe.toml"


def names() -> tuple[str, ...]:
    """The names of all shipped recipes and templates."""
    return tuple(sorted(_all()))


def find(argument: str) -> Path:
    """Returns the recipe file that an argument names: a file, a folder, or a shipped recipe.

    Raises:
        MissingInputError: a path with nothing there.
        UsageError: a name that is not shipped.
    """
    path = Path(argument).expanduser()
    if path.is_dir():
        return _inside(path)
    if path.is_file():
        return path
    if found := _all().get(argument):
        return found
    if len(path.parts) > 1 or path.suffix:
        raise MissingInputError(f"There is no recipe at {argument}.", "Run: kvtune recipe list")
    raise UsageError(f"There is no recipe {argument!r}.", suggest(argument, names()))


def _inside(folder: Path) -> Path:
    if (folder / _FILE).is_file():
        return folder / _FILE
    chosen = folder / "chosen"
    hint = f"Did you mean {chosen}?" if (chosen / _FILE).is_file() else "Run: kvtune recipe list"
    raise MissingInputError(f"The folder {folder} holds no {_FILE}.", hint)


def _all() -> dict[str, Path]:
    place = next((place for place in _PLACES if place.is_dir()), None)
    if place is None:
        return {}
    single = {path.stem: path for path in place.glob("*.toml")}
    return single | {path.parent.name: path for path in place.glob(f"*/{_FILE}")}
