"""Recipe, LayerPolicy, Tier <-> TOML; every check of a recipe."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from kvtune_kernels import Window
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic import PlainSerializer as Serializer

from kvtune import parts
from kvtune.errors import IntegrityError, MissingInputError, UsageError, suggest
from kvtune.files import sha256_bytes, write_atomic
from kvtune.models import Facts
from kvtune.parts import SEARCH, Chain, Codec
from kvtune.spans import check, resolve

FORMAT = 1
MAX_BYTES = 1 << 20  # a recipe is small; anything larger is not read
DEEPEST = 16  # levels of [measured]
RECIPE_FILE = "recipe.toml"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _tables(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError('expected a list of parts such as [{ use = "affine", bits = 4 }]')
    for table in value:
        if SEARCH in table.values():
            found = list(parts.choices(table))
            first = found[0]
        else:
            first = parts.parse(table)
        if not isinstance(first, Codec):
            raise ValueError(f"{first.name()} is a {first.kind}; keys and values take codecs")
    return tuple(dict(table) for table in value)


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
            branch["properties"] = {"use": {"const": name}, **fields}
            branch["required"] = ["use"]
            branches.append(branch)
    return {"type": "array", "items": {"oneOf": branches}}


# `schema` puts the methods in; they are looked for when they are asked for, not on import
Tables = Annotated[
    tuple[dict[str, Any], ...], BeforeValidator(_tables), WithJsonSchema({"type": "array"})
]


class Tier(_Model):
    """How the tokens that have left the window are stored."""

    keys: Tables = ()
    values: Tables = ()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML knows lists only


def _sound(span: str) -> str:
    try:
        check(span)
    except UsageError as error:
        raise ValueError(str(error).removesuffix(".")) from None
    return span


class LayerPolicy(_Model):
    """One policy for a span of layers ("all", "rest", "first 2", "last 2", "0-3, 7")."""

    span: Annotated[str, Field(max_length=2000), AfterValidator(_sound)]
    sinks: Annotated[int, Field(ge=0, le=1024)] = 0
    recent: Annotated[int, Field(ge=0, le=65536)] = 0
    kept: Tier = Tier()

    per_head: ClassVar[bool] = False

    def windows(self) -> tuple[tuple[int, int], ...]:
        """All pairs of sinks and recent that are opened."""
        return ((self.sinks, self.recent),)

    def is_open(self) -> bool:
        """True when a setting still says "search"."""
        return any(SEARCH in table.values() for table in (*self.kept.keys, *self.kept.values))


class Policy(_Model):
    """What one layer does, resolved: chains in place of tables;
    hashable, so encoded tiers can be memoised."""

    sinks: int = 0
    recent: int = 0
    keys: Annotated[Chain, Serializer(str)] = Chain()
    values: Annotated[Chain, Serializer(str)] = Chain()

    @property
    def block(self) -> int:
        """Tokens that move into the tier together."""
        return math.lcm(self.keys.block, self.values.block)

    @property
    def is_dense(self) -> bool:
        """True when nothing is compressed."""
        return not self.keys.codecs and not self.values.codecs

    @property
    def window(self) -> Window:
        """Which tokens stay exact, as kernels are told."""
        return Window(self.sinks, self.recent, self.block)

    def due(self, seen: int) -> int:
        """How many tokens after the sinks have left the window once `seen` tokens are known."""
        return self.window.due(seen)


class ModelBinding(_Model):
    """The model that a recipe was tuned for. The name is only a label; the fingerprint decides."""

    name: str
    fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    architecture: str
    layers: Annotated[int, Field(ge=1, le=10_000)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]


class ArtifactRef(_Model):
    """The tensors of a recipe: a file beside it and its hash."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recipe(_Model):
    """The shareable file: model binding, one policy per layer
    span, a pointer to tensors, and what was measured."""

    kvtune: Literal[1] = 1
    name: str = ""
    description: str = ""
    model: ModelBinding | None = None
    artifact: ArtifactRef | None = None
    layers: Annotated[tuple[LayerPolicy, ...], BeforeValidator(_tuple)] = ()
    measured: dict[str, Any] = {}  # evidence, never read back as configuration

    def is_open(self) -> bool:
        """True for a template: some setting still says "search"."""
        return any(policy.is_open() for policy in self.layers)

    def policies(self, known: Facts) -> tuple[Policy, ...]:
        """Returns one policy per layer; layers that are not compressible get an empty one.

        Raises:
            UsageError: a template, layers not covered exactly once, or settings that do not fit the
            model.
        """
        if self.is_open():
            raise UsageError(
                f"{self.name or 'The recipe'} is a template.",
                "Run: kvtune search, or fill in its settings.",
            )
        if not self.layers:
            return (Policy(),) * len(known.layers)
        resolved = [_resolve(policy) for policy in self.layers]
        owner = resolve([policy.span for policy in self.layers], len(known.layers))
        return tuple(
            _checked(resolved[owner[i]], known.layers[i].head_dim, i)
            if i in known.compressible()
            else Policy()
            for i in range(len(known.layers))
        )

    def dumps(self) -> str:
        """Returns the TOML text."""
        table = self.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
        return tomli_w.dumps({"kvtune": self.kvtune, **table})

    def save(self, path: Path) -> None:
        """Writes the TOML file atomically."""
        write_atomic(path, self.dumps().encode())


def _resolve(policy: LayerPolicy) -> Policy:
    def chain(tables: tuple[dict[str, Any], ...]) -> Chain:
        codecs = [parts.parse(table) for table in tables]
        return Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))

    return Policy(
        sinks=policy.sinks,
        recent=policy.recent,
        keys=chain(policy.kept.keys),
        values=chain(policy.kept.values),
    )


def _checked(policy: Policy, head_dim: int, layer: int) -> Policy:
    for side in ("keys", "values"):
        chain: Chain = getattr(policy, side)
        try:
            chain.check(head_dim, side)
        except ValueError as error:
            raise UsageError(f"layer {layer}, {side}: {error}.") from None
    return policy


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
            f"{where} has format {version}; this kvtune reads {FORMAT}.", "Upgrade kvtune."
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
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def digest(recipe: Recipe) -> str:
    """Hash of what a recipe does: its canonical text without evidence and names."""
    bare = recipe.model_copy(update={"measured": {}, "name": "", "description": ""})
    return sha256_bytes(bare.dumps().encode())


def _check_plain(recipe: Recipe, where: str) -> None:
    """Checks what the field types cannot say: file names, spans, finite evidence."""
    if recipe.artifact and not _FILE_NAME.fullmatch(recipe.artifact.file):
        raise IntegrityError(
            f"{where}: artifact.file {recipe.artifact.file!r} is not a plain file name."
        )
    if problem := _unfit(recipe.measured):
        raise IntegrityError(f"{where}: [measured] holds {problem}.")
    try:
        if recipe.layers and recipe.model:
            resolve([policy.span for policy in recipe.layers], recipe.model.layers)
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
    place = ".".join(map(str, first["loc"]))
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
    if "kept" in place:
        model = Tier
    return tuple(model.model_fields) if model else ()
