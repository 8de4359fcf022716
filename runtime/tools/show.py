"""A calculator's value as JSON: numbers by the rules of `numbers.py`, everything else as text."""

from typing import Any

import sympy

from runtime.tools.algebra import Written, written
from runtime.tools.functions import Value, is_number
from runtime.tools.numbers import ROUNDED_DIGITS, Refused, show_number


def show(value: Value, decimals: bool) -> Any:
    """A value as JSON. decimals: fractions are wanted as decimals. Raises Refused for no value."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Written):
        return str(value)
    if is_number(value):
        return show_number(value, decimals)
    if isinstance(value, list):
        return [show(one, decimals) for one in value]
    if isinstance(value, dict):
        return {name: show(one, decimals) for name, one in value.items()}
    return _show_sympy(value)


def _show_sympy(value: Any) -> Any:
    if value in (sympy.true, sympy.false):
        return bool(value)
    if value.has(sympy.nan, sympy.zoo):
        raise Refused("this has no value (such as 0/0)")
    if not value.is_number:
        return written(value)
    near = value.evalf(ROUNDED_DIGITS + 8)
    if not near.is_Float:
        return written(value)  # infinite, or not real: 2*I
    number = float(near)
    if number == 0 or 1e-300 < abs(number) < 1e300:
        short = float(f"{number:.{ROUNDED_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e12 else short
    return written(near.evalf(ROUNDED_DIGITS))
