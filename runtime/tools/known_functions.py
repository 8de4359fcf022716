"""The calculator's allow-list: every function and constant that an expression may name."""

import math
from typing import Any

import sympy

from runtime.tools import algebra
from runtime.tools.functions import (
    Function,
    combinations,
    factorial,
    mean,
    of_numbers,
    of_sympy,
    ordered,
    percent,
    power,
    root,
    rounding,
    total,
    whole_numbers,
)
from runtime.tools.numbers import round_half_up

MANY = 50  # arguments

CONSTANTS: dict[str, Any] = {
    "pi": sympy.pi,
    "e": sympy.E,
    "E": sympy.E,
    "I": sympy.I,
    "oo": sympy.oo,
}

FUNCTIONS: dict[str, Function] = {
    # numbers
    "abs": Function(of_sympy(sympy.Abs), 1, 1),
    "ceil": Function(of_numbers(math.ceil), 1, 1),
    "floor": Function(of_numbers(math.floor), 1, 1),
    "round": Function(rounding(round_half_up), 1, 2),
    "min": Function(ordered(min), 1, MANY),
    "max": Function(ordered(max), 1, MANY),
    "sum": Function(total, 1, MANY),
    "mean": Function(mean, 1, MANY),
    "percent": Function(percent, 2, 2),
    "mod": Function(of_numbers(lambda number, by: number % by), 2, 2),
    "gcd": Function(whole_numbers(math.gcd), 1, MANY),
    "lcm": Function(whole_numbers(math.lcm), 1, MANY),
    "factorial": Function(factorial, 1, 1),
    "comb": Function(combinations(math.comb), 2, 2),
    "binomial": Function(combinations(math.comb), 2, 2),
    "perm": Function(combinations(math.perm), 2, 2),
    "isprime": Function(algebra.is_prime, 1, 1),
    # powers, logarithms, angles in radians
    "pow": Function(power, 2, 2),
    "sqrt": Function(root, 1, 1),
    "cbrt": Function(lambda value: root(value, 3), 1, 1),
    "root": Function(root, 2, 2),
    "exp": Function(of_sympy(sympy.exp), 1, 1),
    "ln": Function(algebra.logarithm, 1, 1),
    "log": Function(algebra.logarithm, 1, 2),
    "log10": Function(lambda value: algebra.logarithm(value, 10), 1, 1),
    "log2": Function(lambda value: algebra.logarithm(value, 2), 1, 1),
    "sin": Function(of_sympy(sympy.sin), 1, 1),
    "cos": Function(of_sympy(sympy.cos), 1, 1),
    "tan": Function(of_sympy(sympy.tan), 1, 1),
    "asin": Function(of_sympy(sympy.asin), 1, 1),
    "acos": Function(of_sympy(sympy.acos), 1, 1),
    "atan": Function(of_sympy(sympy.atan), 1, 1),
    "radians": Function(lambda value: algebra.angle(value, sympy.pi / 180), 1, 1),
    "degrees": Function(lambda value: algebra.angle(value, 180 / sympy.pi), 1, 1),
    # algebra
    "solve": Function(algebra.solve, 1, 7),
    "equation": Function(algebra.equation, 2, 2),
    "diff": Function(algebra.diff, 1, 3),
    "integrate": Function(algebra.integrate, 1, 4),
    "limit": Function(algebra.limit, 3, 3),
    "simplify": Function(algebra.form(sympy.simplify), 1, 1),
    "expand": Function(algebra.form(sympy.expand), 1, 1),
    "factor": Function(algebra.factor, 1, 1),
    "exact": Function(algebra.exact, 1, 1),
    "decimal": Function(algebra.decimal, 1, 2),
}
