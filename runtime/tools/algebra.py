"""The calculator's algebra: equations, calculus and the forms of an expression, by sympy.

Every function gets objects that the calculator has built, checks their size, and hands them to
sympy. None gets or makes text that sympy would read.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy

from runtime.tools.functions import (
    Value,
    as_number,
    as_sympy,
    is_symbol,
    plain,
    small,
    whole,
)
from runtime.tools.numbers import EXACT_DIGITS, Refused

LARGEST_TO_FACTOR = 10**40
MOST_EQUATIONS = 6
UNDONE = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum)


class Written(str):
    """Text that is a result as it stands, and never a value to reckon on with."""


def equation(left: Value, right: Value) -> Any:
    """left == right, to be solved; True or False where that is clear."""
    found = sympy.Eq(as_sympy(left), as_sympy(right))
    return bool(found) if found in (sympy.true, sympy.false) else found


def solve(equations: Value, *symbols: Value) -> Value:
    """What solves one equation (or expression == 0), or a list of them.

    One unknown: the solution, a list of several, or the words `no solution`. Several unknowns: a
    solution as {name: value}.
    """
    if isinstance(equations, bool):
        return Written("every number" if equations else "no solution")
    given = equations if isinstance(equations, list) else [equations]
    if not 0 < len(given) <= MOST_EQUATIONS:
        raise Refused(f"solve takes 1 to {MOST_EQUATIONS} equations")
    given = [small(one) for one in given]
    unknown = _symbols_of(symbols) or sorted(
        set().union(*(one.free_symbols for one in given)), key=lambda found: found.name
    )
    if not unknown:
        raise Refused("there is no symbol to solve for")
    if len(given) == len(unknown) == 1:
        values = [plain(value) for value in sympy.solve(given[0], unknown[0])]
    else:
        found = sympy.solve(given, *unknown, dict=True)
        values = [{name.name: plain(value) for name, value in one.items()} for one in found]
    if not values:
        return Written("no solution")
    return values[0] if len(values) == 1 else values


def _symbols_of(values: tuple[Value, ...]) -> list[Any]:
    flat = [inner for value in values for inner in (value if isinstance(value, list) else [value])]
    if not all(map(is_symbol, flat)):
        raise Refused("what to solve for must be symbols such as x")
    return flat


def diff(value: Value, *by: Value) -> Value:
    """diff(f), diff(f, x), diff(f, x, 2): the derivative."""
    found = small(value)
    order = whole(by[1], "the order of a derivative", 10) if len(by) == 2 else 1
    return plain(sympy.diff(found, _variable(found, by[:1]), order))


def integrate(value: Value, *by: Value) -> Value:
    """integrate(f), integrate(f, x), integrate(f, x, a, b) or integrate(f, [x, a, b])."""
    found = small(value)
    if len(by) == 1 and isinstance(by[0], list):
        by = tuple(by[0])
    if len(by) not in (0, 1, 3):
        raise Refused("write integrate(f, x) or integrate(f, x, a, b)")
    variable = _variable(found, by[:1])
    bounds = (variable, *map(as_sympy, by[1:])) if len(by) == 3 else variable
    return done(sympy.integrate(found, bounds))


def limit(value: Value, variable: Value, at: Value) -> Value:
    """limit(f, x, a): the limit of f where x goes to a (oo is infinity)."""
    found = small(value)
    return done(sympy.limit(found, _variable(found, (variable,)), as_sympy(at)))


def _variable(found: Any, given: tuple[Value, ...]) -> Any:
    if given:
        if not is_symbol(given[0]):
            raise Refused("the variable must be a symbol such as x")
        return given[0]
    free = sorted(found.free_symbols, key=lambda symbol: symbol.name)
    if len(free) > 1:
        raise Refused("say by which variable: " + " or ".join(symbol.name for symbol in free))
    return free[0] if free else sympy.Symbol("x")


def done(found: Any) -> Value:
    """What sympy found, or Refused where it has only written the task down again."""
    if found.has(*UNDONE) and found.free_symbols:
        raise Refused("no closed form was found")
    return plain(found)


def factor(value: Value) -> Value:
    """The factors of an expression, or the primes of a whole number as text: 2**3*3."""
    found = small(value)
    if not found.is_Integer:
        return plain(sympy.factor(found))
    number = int(found)
    if abs(number) > LARGEST_TO_FACTOR:
        raise Refused("numbers are factored up to 40 digits")
    primes = sympy.factorint(number)
    written = (f"{prime}**{count}" if count > 1 else f"{prime}" for prime, count in primes.items())
    return Written("*".join(written) or "1")


def exact(value: Value) -> Value:
    """The exact form as text: sqrt(2), 10/3."""
    return Written(written(as_sympy(value)))


def decimal(value: Value, digits: Value = 12) -> Value:
    """The decimal form with so many significant digits (50 at most)."""
    places = max(whole(digits, "the number of digits", 50), 1)
    found = as_sympy(value).evalf(places)
    if not (found.is_Float or found.is_zero):
        raise Refused(f"{written(found)[:60]} is no real number")
    text = str(found)
    return Fraction(text) if places <= EXACT_DIGITS and len(text) < 40 else Written(text)


def is_prime(value: Value) -> bool:
    """Whether a whole number is prime."""
    return bool(sympy.isprime(whole(value, "n", LARGEST_TO_FACTOR)))


def form(run: Callable[[Any], Any]) -> Callable[[Value], Value]:
    """simplify, expand and the like: of an expression, or of each side of an equation."""
    return lambda value: plain(run(small(value)))


def written(expression: Any) -> str:
    """An expression as text. Raises Refused when it is too long to read."""
    text = sympy.sstr(expression)
    if len(text) > 1_000:
        raise Refused(f"the result has {len(text)} characters; at most 1000")
    return text


def angle(value: Value, scale: Any) -> Value:
    """radians(x) and degrees(x)."""
    return plain(as_sympy(value) * scale)


def logarithm(value: Value, base: Value = sympy.E) -> Value:
    """log(x) to the base e, log(x, base) to another."""
    if as_sympy(value).is_zero or as_number_or_none(base) in (0, 1):
        raise Refused("this logarithm does not exist")
    return plain(sympy.log(as_sympy(value), as_sympy(base)))


def as_number_or_none(value: Value) -> Any:
    """The number that a value is, if it is an exact one."""
    found = as_sympy(value)
    return as_number(found) if found.is_Rational else None
