"""Recipe, LayerPolicy, Tier <-> TOML; every check of a recipe."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema

from kvtune import parts
from kvtune.allotted import allotted
from kvtune.entries import HeadEntry, Record, as_tuple
from kvtune.errors import IntegrityError, MissingInputError, UsageError, suggest
from kvtune.files import sha256_bytes, write_atomic
from kvtune.models import Facts
from kvtune.parts import ANY, OPTIONAL, SEARCH, Borrower, Codec, Part, Sharer
from kvtune.policy import LayerPolicy as LayerPolicy
from kvtune.policy import Policy as Policy
from kvtune.policy import Tier as Tier
from kvtune.policy import to_entry as to_entry
from kvtune.policy import to_policy
from kvtune.retention import Allocator, Merger, Selector
from kvtune.sharing import settled
from kvtune.shortening import Shortener
from kvtune.spans import resolve

FORMAT = 1
MAX_BYTES = 1 << 20  # a recipe is small; anything larger is not read
DEEPEST = 16  # levels of [measured]
RECIPE_FILE = "recipe.toml"
# of parts that stand alone under a key of a layer
KINDS: dict[str, tuple[type[Part], ...]] = {
    "select": (Selector,),
    "merge": (Merger,),
    "allot": (Allocator,),
    "share": (Sharer, Borrower),
}
UNIONS = ("tuple[HeadEntry, ...]", "Tier")  # pydantic's names of branches: no places in a file
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def _codecs_schema() -> dict[str, Any]:
    """JSON Schema of a codec table: one branch per method found."""
    branches = []
    for name in parts.names():
        cls = parts.find(name)
        if issubclass(cls, Codec):
            branch = cls.model_json_schema()
            fields = (
                {
                    key: {"anyOf": [value, {"const": SEARCH}]}
                    for key, value in branch["properties"].items()
                }
                if ("properties" in branch)
                else {}
            )
            own = {"use": {"const": name}, OPTIONAL: {"const": True}}
            branch["properties"] = {**own, **fields}
            branch["required"] = ["use"]
            branches.append(branch)
    one = {"oneOf": branches}
    several = {"type": "array", "minItems": 1, "items": {"type": "array", "items": one}}
    either: dict[str, Any] = {"type": "object", "properties": {ANY: several}, "required": [ANY]}
    either["additionalProperties"] = False
    return {"type": "array", "items": {"oneOf": [*branches, either]}}


def _kinds_schema(*kinds: type[Part]) -> dict[str, Any]:
    """JSON Schema of the closed table of a part of some kinds."""
    branches = []
    for cls in (parts.find(name) for name in parts.names()):
        if issubclass(cls, kinds):
            branch = cls.model_json_schema()
            branch["properties"] = {"use": {"const": cls.name()}, **branch.get("properties", {})}
            branches.append({**branch, "required": ["use"]})
    return {"oneOf": branches}


def _open_share() -> dict[str, Any]:
    """JSON Schema of a selector whose share is left to a search."""
    shares = {"type": "array", "items": {"type": "number"}, "minItems": 1}
    return {
        "type": "object",
        "properties": {"share": {"anyOf": [{"const": SEARCH}, shares]}},
        "required": ["use", "share"],
    }


def _shortening(value: Any) -> Any:
    if value is None:
        return value
    if not isinstance(value, dict):
        raise ValueError('expected a part such as { use = "specpc" }')
    if parts.is_open(value):
        raise ValueError(f"{value.get('use')} is not searched here: write its settings")
    if not isinstance(found := parts.parse(value), Shortener):
        raise ValueError(f"{found.name()} is a {found.kind}; prefill takes a {Shortener.kind}")
    return value


class ModelBinding(Record):
    """The model that a recipe was tuned for. The name is only a label; the fingerprint decides."""

    name: str
    fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    architecture: str
    layers: Annotated[int, Field(ge=1, le=10_000)]
    kv_heads: Annotated[int, Field(ge=1, le=10_000)]
    head_dim: Annotated[int, Field(ge=1)]


class ArtifactRef(Record):
    """The tensors of a recipe: a file beside it and its hash."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recipe(Record):
    """The shareable file: model binding, one policy per layer
    span, a pointer to tensors, and what was measured."""

    kvtune: Literal[1] = 1
    name: str = ""
    description: str = ""
    model: ModelBinding | None = None
    artifact: ArtifactRef | None = None
    prefill: Annotated[
        dict[str, Any] | None, BeforeValidator(_shortening), WithJsonSchema({"type": "object"})
    ] = None  # what of a prompt is read at all
    layers: Annotated[tuple[LayerPolicy, ...], BeforeValidator(as_tuple)] = ()
    measured: dict[str, Any] = Field(default_factory=dict)  # evidence, never configuration

    def is_open(self) -> bool:
        """True for a template: some setting still says "search"."""
        return any(policy.is_open() for policy in self.layers)

    @property
    def shortener(self) -> Shortener | None:
        """What cuts a prompt before it is read; None where it is read whole."""
        found = parts.parse(self.prefill) if self.prefill else None
        assert found is None or isinstance(found, Shortener), "the recipe was checked"
        return found

    def policies(self, known: Facts) -> tuple[Policy, ...]:
        """Returns one policy per layer; layers that are not compressible get an empty one.

        Raises:
            UsageError: a template, layers not covered exactly once, settings that do not fit the
            model, or budgets that a fit is to share out.
        """
        if self.is_open():
            raise UsageError(
                f"{self.name or 'The recipe'} is a template.",
                "Run: kvtune search, or fill in its settings.",
            )
        if not self.layers:
            return (Policy(),) * len(known.layers)
        entries = allotted(self.layers, known)
        owner = resolve([policy.span for policy in entries], len(known.layers))
        made = [Policy()] * len(known.layers)
        for i in known.compressible():
            shape = known.layers[i].kv_heads, known.layers[i].head_dim
            made[i] = to_policy(entries[owner[i]], shape[0], f"layer {i}")
            if made[i].share is None:
                made[i].check(*shape, i)
                made[i] = made[i].of_shape(*shape)
        return settled(made, known)

    def dumps(self) -> str:
        """Returns the TOML text."""
        table = self.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
        return tomli_w.dumps({"kvtune": self.kvtune, **table})

    def save(self, path: Path) -> None:
        """Writes the TOML file atomically."""
        write_atomic(path, self.dumps().encode())


def loads(text: str, where: str = "recipe") -> Recipe:
    """Parses TOML text.

    Raises:
        IntegrityError: anything that is not a valid recipe of this format, with the place and the
        value.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise IntegrityError(f"{where} is not valid TOML: {error}.") from None
    version = table.get("kvtune")
    if isinstance(version, int) and version > FORMAT:
        raise IntegrityError(
            f"{where} has format {_brief(str(version))}; this kvtune reads {FORMAT}.",
            "Upgrade kvtune.",
        )
    if type(version) is not int or version != FORMAT:
        raise IntegrityError(
            f"{where} does not start with `kvtune = {FORMAT}`, so it is no recipe."
        )
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise IntegrityError(f"{where}: {_in_words(error)}") from None
    _check_plain(recipe, where)
    return recipe


def load(path: Path) -> Recipe:
    """Reads a recipe file, or the `recipe.toml` of a folder;
    IntegrityError as `loads`, MissingInputError."""
    file = path / RECIPE_FILE if path.is_dir() else path
    if not file.is_file():
        raise MissingInputError(f"There is no recipe at {path}.", "Run: kvtune recipe list")
    if file.stat().st_size > MAX_BYTES:
        raise IntegrityError(f"{file} is larger than {MAX_BYTES} bytes, so it is no recipe.")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        raise IntegrityError(f"{file} is not UTF-8 text, so it is no recipe.") from None
    return loads(text, str(file))


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, with every method found."""
    document = Recipe.model_json_schema()
    definitions = document["$defs"]
    definitions["Codecs"] = _codecs_schema()
    for side in ("keys", "values"):
        definitions["Tier"]["properties"][side] = {"$ref": "#/$defs/Codecs"}
    properties = definitions["LayerPolicy"]["properties"]
    for key, kinds in KINDS.items():
        name = f"{key.capitalize()}s"
        definitions[name] = _kinds_schema(*kinds)
        properties[key] = {"$ref": f"#/$defs/{name}"}
    properties["select"] = {"anyOf": [properties["select"], _open_share()]}
    definitions["Shorteners"] = _kinds_schema(Shortener)
    document["properties"]["prefill"] = {"$ref": "#/$defs/Shorteners"}
    definitions["HeadEntry"]["properties"]["select"] = {"$ref": "#/$defs/Selects"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def digest(recipe: Recipe) -> str:
    """Hash of what a recipe does: its canonical text without evidence and names."""
    bare = recipe.model_copy(update={"measured": {}, "name": "", "description": ""})
    return sha256_bytes(bare.dumps().encode())


def _check_plain(recipe: Recipe, where: str) -> None:
    """Checks what the field types cannot say: file names, spans, finite evidence."""
    if recipe.artifact and not _FILE_NAME.fullmatch(recipe.artifact.file):
        raise IntegrityError(
            f"{where}: artifact.file {_brief(recipe.artifact.file)!r} is not a plain file name."
        )
    if problem := _unfit(recipe.measured):
        raise IntegrityError(f"{where}: [measured] holds {problem}.")
    try:
        if recipe.layers and recipe.model:
            resolve([policy.span for policy in recipe.layers], recipe.model.layers)
            for index, policy in enumerate(recipe.layers):
                if not policy.is_open():
                    to_policy(policy, recipe.model.kv_heads, f"layers.{index}")
    except UsageError as error:
        raise IntegrityError(f"{where}: {error}") from None


def _unfit(value: Any, depth: int = 0) -> str:
    """Says what keeps a value from being written as it was read; nothing when it is sound."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number that is not finite"
    if isinstance(value, str | int):
        return ""
    if not isinstance(value, dict | list):
        return f"{value!r}, which is no number, text, list or table"
    if depth == DEEPEST:
        return f"tables or lists more than {DEEPEST} deep"
    inside = value.values() if isinstance(value, dict) else value
    return next(filter(None, (_unfit(item, depth + 1) for item in inside)), "")


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in UNIONS)
    if first["type"] == "extra_forbidden":
        key, known = str(first["loc"][-1]), _fields_at(first["loc"][:-1])
        place = _brief(place)
        return f"unknown key {place}. {suggest(key, known)}" if known else f"unknown key {place}."
    value = repr(first["input"])
    shown = "" if len(value) > 60 or first["type"] == "value_error" else f", got {value}"
    told = first["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"{place}: {_brief(told)}{shown}."


def _brief(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


def _fields_at(place: tuple[int | str, ...]) -> tuple[str, ...]:
    model: Any = {"layers": LayerPolicy, "model": ModelBinding, "artifact": ArtifactRef}.get(
        str(place[0]) if place else "", None if place else Recipe
    )
    if "heads" in place:
        model = HeadEntry
    if "kept" in place or "rest" in place:
        model = Tier
    return tuple(model.model_fields) if model else ()
