"""Marks: what values a part's setting may take; they feed validation, schema and search space."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Setting = int | float | str | bool


class OneOf(NamedTuple):
    """A mark: the setting is one of these values."""

    choices: tuple[Setting, ...]

    def legal(self) -> tuple[Setting, ...]:
        """All values, in order."""
        return self.choices

    def validate(self, value: Setting) -> Setting:
        """Returns the value, or raises ValueError."""
        if value not in self.choices or isinstance(value, bool):
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
