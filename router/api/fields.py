"""Checks of single request fields. Each takes the value and the field's name and returns what it means, or raises ApiError."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from .errors import ApiError

T = TypeVar("T")
Check = Callable[[object, str], T]

_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def wrong_type(value: object, name: str, wanted: str) -> ApiError:
    """The error for a value of another JSON type."""
    given = _NAMES.get(type(value), type(value).__name__)
    return ApiError(f"invalid type for '{name}': expected {wanted}, got {given}", param=name, code="invalid_type")


def out_of_range(name: str, text: str) -> ApiError:
    """The error for a value that is too small, too large or too long."""
    return ApiError(f"invalid '{name}': {text}", param=name, code="invalid_value")


def integer(low: int, high: int) -> Check[int]:
    """An integer, not a boolean and not 1.0."""

    def check(value: object, name: str) -> int:
        if type(value) is not int:
            raise wrong_type(value, name, "an integer")
        if not low <= value <= high:
            raise out_of_range(name, f"must be between {low} and {high}, got {value if abs(value) < 1e18 else 'more'}")
        return value

    return check


def number(low: float, high: float, *, above_low: bool = False) -> Check[float]:
    """A finite number; with `above_low` larger than `low`."""

    def check(value: object, name: str) -> float:
        if type(value) is not int and type(value) is not float:
            raise wrong_type(value, name, "a number")
        assert isinstance(value, int | float)
        if not low <= value <= high or (above_low and value == low) or not math.isfinite(value):
            shown = f"{value:g}" if abs(value) < 1e300 else "more"
            raise out_of_range(
                name, f"must be {'above' if above_low else 'at least'} {low:g} and at most {high:g}, got {shown}"
            )
        return float(value)

    return check


def boolean(value: object, name: str) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise wrong_type(value, name, "a boolean")
    return value


def string(length_max: int, *, length_min: int = 0) -> Check[str]:
    """Text of bounded length that can be encoded."""

    def check(value: object, name: str) -> str:
        if type(value) is not str:
            raise wrong_type(value, name, "a string")
        if not length_min <= len(value) <= length_max:
            raise out_of_range(name, f"must have {length_min} to {length_max} characters, got {len(value)}")
        return value

    return check


def array(value: object, name: str, *, length_min: int, length_max: int) -> list[object]:
    """A list of bounded length."""
    if type(value) is not list:
        raise wrong_type(value, name, "an array")
    if not length_min <= len(value) <= length_max:
        raise out_of_range(name, f"must have {length_min} to {length_max} items, got {len(value)}")
    return value


def only(allowed: object, why: str) -> Check[None]:
    """A field that is understood but not served: only its neutral value passes."""

    def check(value: object, name: str) -> None:
        if value != allowed or type(value) is not type(allowed):
            raise ApiError(f"'{name}' is not supported: {why}", param=name, code="unsupported_parameter")

    return check


def refused(why: str) -> Check[None]:
    """A field that no client may send."""

    def check(value: object, name: str) -> None:
        raise ApiError(f"'{name}' is not accepted: {why}", param=name, code="unsupported_parameter")

    return check


def ignored(value: object, name: str) -> None:
    """A field that changes nothing here."""
