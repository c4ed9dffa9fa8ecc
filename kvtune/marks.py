"""Marks: what values a part's setting may take; they feed validation, schema and search space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from kvtune.errors import suggest

Setting = int | float | str | bool


class OneOf(NamedTuple):
    """A mark: the setting is one of these values."""

    choices: tuple[Setting, ...]

    def legal(self) -> tuple[Setting, ...]:
        """All values, in order."""
        return self.choices

    def validate(self, value: Setting) -> Setting:
        """Returns the value, or raises ValueError."""
        if not any(value == one and type(value) is type(one) for one in self.choices):
            raise ValueError(f"{value!r} is not one of {', '.join(map(repr, self.choices))}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.choices)}


class Between(NamedTuple):
    """A mark: the setting is a whole number from low to high, in steps."""

    low: int
    high: int
    step: int = 1

    def legal(self) -> tuple[Setting, ...]:
        """All values, in order."""
        return tuple(range(self.low, self.high + 1, self.step))

    def validate(self, value: int) -> int:
        """Returns the value, or raises ValueError."""
        if value not in range(self.low, self.high + 1, self.step):
            raise ValueError(
                f"{value} is not between {self.low} and {self.high} in steps of {self.step}"
            )
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if self.low % self.step:  # JSON Schema counts steps from zero
            return {"enum": list(self.legal())}
        return {
            "type": "integer",
            "minimum": self.low,
            "maximum": self.high,
            "multipleOf": self.step,
        }


class Share(NamedTuple):
    """A mark: the setting is a part of a whole, above 0 and up to 1, in whole 64ths."""

    choices: tuple[float, ...]  # what "search" opens

    def legal(self) -> tuple[Setting, ...]:
        """What a search tries, in order."""
        return self.choices

    def validate(self, value: float) -> float:
        """Returns the value, or raises ValueError."""
        if not 0 < value <= 1 or value * 64 % 1:
            raise ValueError(f"{value:g} is not a share of 1/64, 2/64 ... 1")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 1 / 64}


class Portion(NamedTuple):
    """A mark: the setting is a part of a whole, above 0 and up to 1."""

    choices: tuple[float, ...]  # what "search" opens

    def legal(self) -> tuple[Setting, ...]:
        """What a search tries, in order."""
        return self.choices

    def validate(self, value: float) -> float:
        """Returns the value, or raises ValueError."""
        if not 0 < value <= 1:
            raise ValueError(f"{value:g} is not above 0 and up to 1")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


class Upto(NamedTuple):
    """A mark: the setting is a whole number from 0 up to most."""

    most: int
    choices: tuple[int, ...]  # what "search" opens

    def legal(self) -> tuple[Setting, ...]:
        """What a search tries, in order."""
        return self.choices

    def validate(self, value: int) -> int:
        """Returns the value, or raises ValueError."""
        if not 0 <= value <= self.most:
            raise ValueError(f"{value} is not from 0 up to {self.most}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "integer", "minimum": 0, "maximum": self.most}


MOST_OPENED = 16  # values that one list may open


class Tokens(NamedTuple):
    """A mark: a number of tokens; in a template also "search", or a list of the numbers to try."""

    most: int
    choices: tuple[int, ...]  # what "search" opens

    def opened(self, value: int | str | tuple[int, ...]) -> tuple[int, ...]:
        """All numbers that a value stands for; one when it is a number."""
        if isinstance(value, str):
            return self.choices
        return value if isinstance(value, tuple) else (value,)

    def validate(self, value: Any, whole: Callable[[Any], int]) -> int | str | tuple[int, ...]:
        """Returns a number, a tuple of different numbers or "search", or raises ValueError."""
        if value == "search":
            return "search"
        if not isinstance(value, list | tuple):
            return whole(value)
        if not 0 < len(value) <= MOST_OPENED:
            raise ValueError(f"a list opens 1 to {MOST_OPENED} values, not {len(value)}")
        found = tuple(whole(one) for one in value)
        if len(set(found)) < len(found):
            raise ValueError("a list opens each value once")
        return found

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self.validate,
            core_schema.int_schema(strict=True, ge=0, le=self.most),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: list(value) if isinstance(value, tuple) else value
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        whole = {"type": "integer", "minimum": 0, "maximum": self.most}
        several = {"type": "array", "items": whole, "minItems": 1, "maxItems": MOST_OPENED}
        return {"anyOf": [whole, {"const": "search"}, {**several, "uniqueItems": True}]}


def legal_values(cls: Any, name: str) -> tuple[Setting, ...]:
    """All values that a setting's mark (OneOf, Between, Literal) allows; ValueError without."""
    field = cls.model_fields.get(name)
    if field is None:
        raise ValueError(f"{cls.name()} has no {name!r}. {suggest(name, tuple(cls.model_fields))}")
    for mark in field.metadata:
        if isinstance(mark, OneOf | Between | Share | Portion | Upto):
            return mark.legal()
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    raise ValueError(f"{cls.name()}.{name} has no mark that bounds it, so it cannot be searched")
