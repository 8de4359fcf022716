"""What a program finds around it: built-ins, a frozen `math`, guards on attributes and size.

Nothing here is shared between programs: `surroundings` builds it afresh, and the process ends with
the program. There is no `type`, `open`, `eval`, `super`, `bytes`, `vars` or module but `math`.
"""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

from RestrictedPython.Guards import (
    full_write_guard,
    guarded_iter_unpack_sequence,
    guarded_unpack_sequence,
    safe_builtins,
    safer_getattr_raise,
)

LARGEST_BITS = 100_000  # of an integer: about 30,000 digits
LONGEST_SEQUENCE = 2_000_000  # elements of a repeated list or text
WIDEST_FIELD = 10_000  # of `'%9999d' % n`
LARGEST_FACTORIAL = 5_000

_NOT_OFFERED = ("id", "delattr", "setattr", "_getattr_", "pow")
_OFFERED = (
    all, any, bin, dict, enumerate, filter, frozenset, iter, list, map, max, min, next, object,
    reversed, set, sorted, sum, tuple, zip,
)  # fmt: skip
_MATH = """acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh degrees dist e exp
exp2 expm1 fabs floor fmod fsum gcd hypot inf isclose isfinite isinf isnan isqrt lcm log log10 log1p
log2 modf nan pi prod radians sin sinh sqrt tan tanh tau trunc"""
_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\d{5,}|\*)")


class TooLarge(ValueError):
    """A value that is not computed because of its size."""


def binary(sign: str, left: Any, right: Any) -> Any:
    """left `sign` right, when the result is of bounded size."""
    check_size(sign, left, right)
    return _BINARY[sign](left, right)


def in_place(sign: str, left: Any, right: Any) -> Any:
    """left `sign` right, where lists and sets change in place as in Python. sign: such as `+=`."""
    check_size(sign[:-1], left, right)
    return _IN_PLACE[sign](left, right)


def check_size(sign: str, left: Any, right: Any) -> None:
    """Raises TooLarge when `left sign right` would be. Subclasses of int and str do not exist."""
    if sign == "**" and isinstance(left, int) and isinstance(right, int):
        _bound(abs(left).bit_length() * abs(right) if abs(left) > 1 else 1)
    elif sign == "<<" and isinstance(left, int) and isinstance(right, int):
        _bound(left.bit_length() + right)
    elif sign == "*" and isinstance(left, int) and isinstance(right, int):
        _bound(left.bit_length() + right.bit_length())
    elif sign == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
        _repeats(left, right)
    elif sign == "*" and isinstance(right, (str, list, tuple)) and isinstance(left, int):
        _repeats(right, left)
    elif sign == "%" and isinstance(left, str) and _WIDTH.search(left):
        raise TooLarge(
            f"fields are at most {WIDEST_FIELD - 1} wide, and their width is written out"
        )


def _bound(bits: int) -> None:
    if bits > LARGEST_BITS:
        raise TooLarge(f"an integer gets longer than {LARGEST_BITS} bits")


def _repeats(sequence: Any, times: int) -> None:
    if len(sequence) * times > LONGEST_SEQUENCE:
        raise TooLarge(f"a sequence gets longer than {LONGEST_SEQUENCE} elements")


def power(left: Any, right: Any, modulus: Any = None) -> Any:
    """pow() of bounded size."""
    return binary("**", left, right) if modulus is None else pow(left, right, modulus)


def attribute(owner: Any, name: str, *default: Any) -> Any:
    """getattr() without underscores, frames, str.format and `mro`, which leads to `object`."""
    if name == "mro":
        raise AttributeError("mro is not offered")
    return safer_getattr_raise(owner, name, *default)


def has_attribute(owner: Any, name: str) -> bool:
    """hasattr() under the same rules."""
    try:
        attribute(owner, name)
    except (AttributeError, NotImplementedError, TypeError):
        return False
    return True


def make_class(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    """A class of the program's own: its instances may be written to; its bases are plain."""
    for base in bases:
        if not (base is object or issubclass(base, BaseException) or _is_ours(base)):
            raise TypeError(f"a class cannot derive from {base.__name__}")
    extra = {"_guarded_writes": True, "__repr__": lambda self: f"<{name}>"}
    return type(name, bases, body | extra)


def _is_ours(base: type) -> bool:
    return getattr(base, "_guarded_writes", False) is True


def import_facade(name: str, *rest: Any) -> Any:
    """`import math`, and nothing else."""
    if name != "math" or (len(rest) > 3 and rest[3] != 0):
        raise ImportError(f"there is no module {str(name)[:40]!r} here; only math")
    return _facade()


def _facade() -> Any:
    functions = {name: getattr(math, name) for name in _MATH.split()}
    functions |= {"factorial": _factorial, "comb": _choose(math.comb), "perm": _choose(math.perm)}
    functions["pow"] = math.pow
    body = {
        name: staticmethod(found) if callable(found) else found for name, found in functions.items()
    }
    return type("math", (), {"__slots__": (), **body})()


def _factorial(number: int) -> int:
    if number > LARGEST_FACTORIAL:
        raise TooLarge(f"factorials go to {LARGEST_FACTORIAL}")
    return math.factorial(number)


def _choose(function: Callable[..., int]) -> Callable[..., int]:
    def bounded(n: int, *k: int) -> int:
        if n > LARGEST_FACTORIAL:
            raise TooLarge(f"n goes to {LARGEST_FACTORIAL}")
        return function(n, *k)

    return bounded


def surroundings(printer: Callable[[Any], Any]) -> dict[str, Any]:
    """The globals of a program. printer: gives the object whose `_call_print` print() becomes."""
    offered = {name: kept for name, kept in safe_builtins.items() if name not in _NOT_OFFERED}
    offered |= {function.__name__: function for function in _OFFERED}
    offered |= {
        "__import__": import_facade,
        "getattr": attribute,
        "hasattr": has_attribute,
        "pow": power,
    }
    return {
        "__builtins__": offered,
        "__name__": "program",
        "__metaclass__": make_class,
        "_apply_": lambda function, *given, **named: function(*given, **named),
        "_binary_": binary,
        "_getattr_": attribute,
        "_getitem_": operator.getitem,
        "_getiter_": iter,
        "_inplacevar_": in_place,
        "_iter_unpack_sequence_": guarded_iter_unpack_sequence,
        "_print_": printer,
        "_unpack_sequence_": guarded_unpack_sequence,
        "_write_": full_write_guard,
    }


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "*": operator.mul,
    "**": operator.pow,
    "%": operator.mod,
    "<<": operator.lshift,
}
_IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "+=": operator.iadd,
    "-=": operator.isub,
    "*=": operator.imul,
    "**=": operator.ipow,
    "/=": operator.itruediv,
    "//=": operator.ifloordiv,
    "%=": operator.imod,
    "<<=": operator.ilshift,
    ">>=": operator.irshift,
    "&=": operator.iand,
    "|=": operator.ior,
    "^=": operator.ixor,
    "@=": operator.imatmul,
}
