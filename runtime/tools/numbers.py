"""Exact numbers of bounded size: what the calculator reckons with, and how it writes results.

A number is an int or a Fraction, so that 0.1+0.2 is 0.3. How a result is written, as someone with
a school calculator expects:

1. a whole number as one: 408
2. a number whose decimals end within 15 digits as a decimal: 2.5, 0.3
3. another quotient as a fraction in lowest terms, while its denominator is at most 1000: "10/3";
   as a decimal where the expression itself was written with decimals or percents
4. everything else rounded to 12 digits: 1.41421356237
"""

import math
from fractions import Fraction

Number = int | Fraction

LARGEST_BITS = 4_096  # of a numerator or denominator: about 1,233 digits
LARGEST_DENOMINATOR = 1_000  # of a result that is written as a fraction
EXACT_DIGITS, ROUNDED_DIGITS = 15, 12  # 15: what every float carries


class Refused(ValueError):
    """A calculation that is not done; the message says why, for the model to read."""


def bits(number: Number) -> int:
    """Size of a number: bits of the longer of numerator and denominator."""
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def bounded(number: Number) -> Number:
    """The number itself, a whole one as int. Raises Refused when it is too large."""
    if bits(number) > LARGEST_BITS:
        raise Refused(f"a number gets longer than {LARGEST_BITS} bits")
    return int(number) if number.denominator == 1 else number


def power(number: Number, exponent: int) -> Number:
    """A whole power, refused before it is computed when its size is beyond the limit."""
    if number == 0 and exponent < 0:
        raise ZeroDivisionError
    if bits(number) > 1 and abs(exponent) * (bits(number) - 1) > LARGEST_BITS:
        raise Refused(f"a power gets longer than {LARGEST_BITS} bits")
    return bounded(Fraction(number) ** exponent)


def product(left: Number, right: Number) -> Number:
    """A product; its factors are bounded, so that it is computed and then judged."""
    return bounded(left * right)


def round_half_up(number: Number, digits: int = 0) -> Number:
    """Rounded as at school: halves go away from zero (Python's round sends 2.5 to 2)."""
    if abs(digits) > 30:
        raise Refused("round takes -30 to 30 digits")
    scale = Fraction(10) ** digits
    whole = math.floor(abs(number) * scale + Fraction(1, 2))
    return bounded(whole / scale * (-1 if number < 0 else 1))


def decimal_or_none(number: Number) -> float | None:
    """The number as a decimal that is exactly it, if there is one of 15 digits at most."""
    denominator = number.denominator
    for factor in (2, 5):
        while denominator % factor == 0:
            denominator //= factor
    if denominator != 1 or bits(number) > 1_000:
        return None
    written = f"{float(number):.{EXACT_DIGITS}g}"
    return float(written) if Fraction(written) == number else None


def rounded(number: Number) -> float | str:
    """The number with 12 significant digits; as text where a float cannot hold it."""
    try:
        return float(f"{float(number):.{ROUNDED_DIGITS}g}")
    except OverflowError:
        digits = str(abs(int(number)))
        sign = "-" if number < 0 else ""
        return f"{sign}{digits[0]}.{digits[1:ROUNDED_DIGITS]}e+{len(digits) - 1}"


def show_number(number: Number, decimals: bool) -> int | float | str:
    """A number as a JSON value by the rules above. decimals: no fractions, please."""
    if number.denominator == 1:
        return int(number)
    exact = decimal_or_none(number)
    if exact is not None:
        return exact
    if not decimals and number.denominator <= LARGEST_DENOMINATOR:
        return f"{number.numerator}/{number.denominator}"
    return rounded(number)
