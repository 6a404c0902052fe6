"""Argument checks. The keyword is the argument's name, so that the message can say it.

Each returns the checked value as a plain Python number or string. None looks inside a tensor.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn


def _fail(kind: type[Exception], expected: str, got: Any, advice: str) -> NoReturn:
    raise kind(f"Expected {expected}, got {got!r}." + (f" {advice}" if advice else ""))


def _number(name: str, value: Any, advice: str) -> float:
    if isinstance(value, (bool, str, bytes)) or value is None:
        _fail(TypeError, f"{name} to be a number", value, advice)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        _fail(TypeError, f"{name} to be a number", value, advice)


def real(advice: str = "", /, **named: Any) -> float:
    """A number that is not NaN."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if math.isnan(number):
        _fail(ValueError, f"{name} to be a number", value, advice)
    return number


def positive(advice: str = "", /, **named: Any) -> float:
    """A finite number above zero."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if not 0.0 < number < math.inf:
        _fail(ValueError, f"{name} to be positive and finite", value, advice)
    return number


def non_negative(advice: str = "", /, **named: Any) -> float:
    """A number at or above zero; infinity passes."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if not number >= 0.0:
        _fail(ValueError, f"{name} >= 0", value, advice)
    return number


def finite_non_negative(advice: str = "", /, **named: Any) -> float:
    """A finite number at or above zero."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if not 0.0 <= number < math.inf:
        _fail(ValueError, f"{name} to be finite and >= 0", value, advice)
    return number


def probability(advice: str = "", /, **named: Any) -> float:
    """A number in [0, 1]."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if not 0.0 <= number <= 1.0:
        _fail(ValueError, f"0 <= {name} <= 1", value, advice)
    return number


def open_unit(advice: str = "", /, **named: Any) -> float:
    """A number strictly between 0 and 1."""
    ((name, value),) = named.items()
    number = _number(name, value, advice)
    if not 0.0 < number < 1.0:
        _fail(ValueError, f"0 < {name} < 1", value, advice)
    return number


def integer(advice: str = "", /, *, at_least: int, **named: Any) -> int:
    """A whole number (not a bool) of at least `at_least`."""
    ((name, value),) = named.items()
    if isinstance(value, bool):
        _fail(TypeError, f"{name} to be a whole number", value, advice)
    try:
        number = operator.index(value)
    except TypeError:
        _fail(TypeError, f"{name} to be a whole number", value, advice)
    if number < at_least:
        _fail(ValueError, f"{name} >= {at_least}", value, advice)
    return number


def choice(options: tuple[str, ...], advice: str = "", /, **named: Any) -> str:
    """One of the named options."""
    ((name, value),) = named.items()
    if value not in options:
        _fail(ValueError, f"{name} to be one of {', '.join(map(repr, options))}", value, advice)
    return value
