"""The functions that the calculator knows: exact on numbers, sympy's on everything else.

Each takes values that the calculator has built (numbers, sympy objects, lists of them): never text.
A function that could grow without bound refuses beforehand; the rest is the worker's deadline.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy

from runtime.tools.numbers import LARGEST_BITS, Number, Refused, bits, bounded
from runtime.tools.numbers import power as whole_power

Value = Any  # Number | sympy.Basic | bool | list[Value] | dict[str, Value]

LARGEST_DEGREE = 64  # whole exponent of something with symbols
MOST_TERMS = 500  # of an expanded product, by an upper bound
LARGEST_FACTORIAL = 500


@dataclass(frozen=True)
class Function:
    """A function and how many arguments it takes."""

    run: Callable[..., Value]
    fewest: int
    most: int

    @property
    def takes(self) -> str:
        """The number of arguments in words."""
        span = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{span} argument{'s' if self.most > 1 else ''}"


def is_number(value: Value) -> bool:
    """Whether a value is an exact number of Python's (a bool is none)."""
    return type(value) in (int, Fraction)


def as_sympy(value: Value) -> Any:
    """A value as a sympy object. Raises Refused for what is none, such as a list."""
    if is_number(value):
        return sympy.Rational(value.numerator, value.denominator)
    if isinstance(value, sympy.Basic):
        return value
    raise Refused("expected a number or an expression here")


def as_number(value: Value) -> Number:
    """The exact number that a sympy object is, or a 30-digit one near an irrational number."""
    if is_number(value):
        return value
    found = as_sympy(value)
    if found.is_Rational:
        return bounded(Fraction(int(found.p), int(found.q)))
    near = found.evalf(30) if found.is_number else None
    if near is None or not near.is_Float:
        raise Refused(f"{str(found)[:60]} is no real number")
    exact = sympy.Rational(near)
    return bounded(Fraction(int(exact.p), int(exact.q)))


def whole(value: Value, what: str, largest: int) -> int:
    """A whole number of 0 to `largest`, or Refused with what it was to be."""
    number = as_number(value)
    if number.denominator != 1 or not 0 <= number <= largest:
        raise Refused(f"{what} must be a whole number of 0 to {largest}")
    return int(number)


def symbol(name: str) -> Any:
    """A symbol for a name of one or two letters."""
    if not (name.isascii() and name.isalpha() and len(name) <= 2):
        raise Refused(f"{name!r} is neither a function nor a symbol of one or two letters")
    return sympy.Symbol(name)


def is_symbol(value: Value) -> bool:
    """Whether a value is a symbol such as x."""
    return isinstance(value, sympy.Symbol)


def power(base: Value, exponent: Value) -> Value:
    """A power of bounded size."""
    if is_number(base) and is_number(exponent):
        if exponent.denominator == 1:
            return whole_power(base, int(exponent))
        if (abs(exponent) + 1) * bits(base) > LARGEST_BITS or bits(exponent) > 64:
            raise Refused(f"a power gets longer than {LARGEST_BITS} bits")
        if base == 0 and exponent < 0:
            raise ZeroDivisionError
    elif is_number(exponent) and abs(exponent) > LARGEST_DEGREE:
        raise Refused(f"exponents of an expression go to {LARGEST_DEGREE}")
    return plain(as_sympy(base) ** as_sympy(exponent))


def plain(value: Any) -> Value:
    """A rational number of sympy's as one of Python's; everything else as it is."""
    return as_number(value) if getattr(value, "is_Rational", False) else value


def terms(expression: Any) -> int:
    """An upper bound for the terms of an expression when it is multiplied out."""
    inner = [terms(argument) for argument in expression.args]
    if expression.is_Add:
        return min(sum(inner), MOST_TERMS + 1)
    if expression.is_Mul:
        return min(math.prod(inner), MOST_TERMS + 1)
    if expression.is_Pow and expression.exp.is_Integer:
        size, exponent = inner[0], abs(int(expression.exp))
        return min(math.comb(size + exponent - 1, exponent), MOST_TERMS + 1)
    return 1


def small(value: Value) -> Any:
    """A value as a sympy expression that stays small when it is multiplied out."""
    found = as_sympy(value)
    if isinstance(found, sympy.Expr) and terms(found) > MOST_TERMS:
        raise Refused(f"multiplied out this has more than {MOST_TERMS} terms")
    return found


def flat(values: tuple[Value, ...]) -> list[Value]:
    """Arguments of max(1, 2) and of max([1, 2]) alike."""
    found = list(values[0]) if len(values) == 1 and isinstance(values[0], list) else list(values)
    if not found:
        raise Refused("an empty list has no such value")
    return found


def ordered(pick: Callable[..., Number]) -> Callable[..., Value]:
    """min or max, of numbers and of irrational ones such as sqrt(2)."""
    return lambda *values: pick(flat(values), key=as_number)


def total(*values: Value) -> Value:
    """The sum of a list, or sum(f, k, a, b): f for k from a to b, added up."""
    if len(values) == 4 and is_symbol(values[1]):
        first, last = as_number(values[2]), as_sympy(values[3])
        return plain(sympy.summation(small(values[0]), (values[1], as_sympy(first), last)))
    return plain(sum((as_sympy(value) for value in flat(values)), sympy.Integer(0)))


def mean(*values: Value) -> Value:
    """The arithmetic mean of a list."""
    return plain(as_sympy(total(*values)) / len(flat(values)))


def root(value: Value, degree: Value = 2) -> Value:
    """The real root: of a negative number only where the degree is odd."""
    order = whole(degree, "the degree of a root", 100)
    if order == 0:
        raise ZeroDivisionError
    found = as_sympy(value)
    if found.is_negative and order % 2:
        return plain(-sympy.root(-found, order))
    return plain(sympy.root(found, order))


def of_numbers(run: Callable[..., Number]) -> Callable[..., Value]:
    """A function that turns every argument into an exact number first."""
    return lambda *values: bounded(run(*map(as_number, values)))


def of_sympy(run: Callable[..., Any]) -> Callable[..., Value]:
    """A function of sympy's, whose arguments stay small when multiplied out."""
    return lambda *values: plain(run(*map(small, values)))


def whole_numbers(run: Callable[..., int]) -> Callable[..., Value]:
    """gcd and lcm: of any count of whole numbers."""

    def of(*values: Value) -> Value:
        numbers = [as_number(value) for value in flat(values)]
        if any(number.denominator != 1 for number in numbers):
            raise Refused("only whole numbers have one")
        return bounded(run(*map(int, numbers)))

    return of


def combinations(run: Callable[[int, int], int]) -> Callable[[Value, Value], Value]:
    """Binomial coefficients and permutations of bounded size."""
    return lambda n, k: bounded(run(whole(n, "n", 10**4), whole(k, "k", LARGEST_FACTORIAL)))


def factorial(value: Value) -> Value:
    """n! for n up to 500."""
    return math.factorial(whole(value, "n", LARGEST_FACTORIAL))


def percent(part: Value, whole_value: Value) -> Value:
    """percent(15, 80): 15 % of 80."""
    return plain(as_sympy(part) * as_sympy(whole_value) / 100)


def rounding(run: Callable[..., Number]) -> Callable[..., Value]:
    """round(x) and round(x, digits)."""
    return lambda value, digits=0: run(as_number(value), int(as_number(digits)))
