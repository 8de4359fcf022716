"""The tool `calc`: an expression in, its value out.

    text -> calculators' spelling made Python's -> syntax tree -> exact numbers, or sympy objects

The tree is walked by this file alone: numbers, one- and two-letter symbols, operators and the
functions of `functions.py`. Nothing is evaluated by Python or sympy from text: sympy's `sympify`
and `parse_expr` are `eval`, and so is every sympy function that is handed a string, so that none
ever is. Plain arithmetic does not touch sympy. Numbers are bounded before they are computed; what
takes too long in sympy all the same ends with the worker's deadline.

Understood beside Python's spelling: `^` for powers, `15%` and `15% of 80`, `2x` and `2(3+4)`, a
single `=` in an equation, and the signs × ÷ − · π √ ² ³. Angles are in radians; `round` is the
school's (half away from zero). How results are written: `numbers.py`.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from runtime.tools.functions import Value, as_sympy, is_number, symbol
from runtime.tools.functions import power as power_of
from runtime.tools.known_functions import CONSTANTS, FUNCTIONS
from runtime.tools.numbers import Number, Refused, bounded, product
from runtime.tools.show import show

LONGEST = 500  # characters
MOST_NODES, DEEPEST = 400, 60  # of the syntax tree
LARGEST_EXPONENT = 300  # of a number such as 1e300

_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "π": " pi ", "²": "^2", "³": "^3"})
_ALLOWED = re.compile(r"[0-9A-Za-z+\-*/%^().,=<>!\[\] \t]*")
_NUMBER = r"(?:[0-9]++\.?+[0-9]*+|\.[0-9]++)"
_PERCENT = re.compile(rf"({_NUMBER})\s*%(?=\s*(?:$|[)\],*/+=<>-]|of\b))(?!\s*-?\s*[0-9(])")
_OF = re.compile(r"(?<=/100\))\s*of\b")
_JUXTAPOSED = re.compile(
    rf"(?<![A-Za-z0-9.])({_NUMBER}(?:[eE][+-]?[0-9]++)?+)\s*(?=[A-Za-z(])|(\))\s*(?=[A-Za-z0-9(])"
)
_SINGLE_EQUALS = re.compile(r"(?<![<>=!])=(?!=)")


def calculate(expression: str) -> Any:
    """The value of an expression as JSON. Raises Refused, with what is wrong and where."""
    text = spelled_for_python(expression)
    tree = parsed(text)
    try:
        return show(_Walk(text).value(tree, 0), decimals="." in text or "%" in expression)
    except ZeroDivisionError:
        raise Refused("division by zero") from None


def spelled_for_python(expression: str) -> str:
    """The expression in Python's spelling; refuses every character that has no place in one."""
    if len(expression) > LONGEST:
        raise Refused(f"the expression has {len(expression)} characters; at most {LONGEST}")
    text = re.sub(r"√\s*\(", "sqrt(", expression.strip().translate(_SIGNS))
    text = re.sub(rf"√\s*({_NUMBER})", r"sqrt(\1)", text)
    bad = _ALLOWED.match(text)
    if bad is None or bad.end() < len(text):
        letter = text[bad.end() if bad else 0]
        raise Refused(f"{letter!r} has no place in an expression")
    text = _OF.sub("*", _PERCENT.sub(r"(\1/100)", text)).replace("^", "**")
    return _SINGLE_EQUALS.sub("==", _JUXTAPOSED.sub(r"\1\2*", text))


def parsed(text: str) -> ast.expr:
    """The syntax tree of an expression, of bounded size. Nothing is evaluated."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        place = f" at character {error.offset}" if error.offset else ""
        raise Refused(f"not an expression{place}: {text[:80]!r}") from None
    except (RecursionError, MemoryError, ValueError):
        raise Refused("the expression is nested too deeply, or a number is too long") from None
    if sum(1 for _ in ast.walk(tree)) > MOST_NODES:
        raise Refused(f"the expression has more than {MOST_NODES} parts")
    return tree


class _Walk:
    """Computes a syntax tree from its leaves; `text` is what it was parsed from."""

    def __init__(self, text: str):
        self.text = text

    def value(self, node: ast.expr, depth: int) -> Value:
        """The value of a node. Raises Refused for kinds of nodes that no expression needs."""
        if depth > DEEPEST:
            raise Refused(f"the expression is nested deeper than {DEEPEST}")
        kinds: dict[type, Callable[[Any, int], Value]] = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.UnaryOp: self._unary,
            ast.BinOp: self._binary,
            ast.Compare: self._comparison,
            ast.Call: self._call,
            ast.List: self._list,
            ast.Tuple: self._list,
        }
        if type(node) not in kinds:
            raise Refused(f"{type(node).__name__} has no place in an expression")
        return kinds[type(node)](node, depth + 1)

    def _constant(self, node: ast.Constant, depth: int) -> Value:
        if type(node.value) is int:
            return bounded(node.value)
        if type(node.value) is not float:
            raise Refused(f"{node.value!r} is no number")
        written = self.text[node.col_offset : node.end_col_offset]  # exact, as the float is not
        _, _, exponent = written.lower().partition("e")
        if len(exponent) > 4 or abs(int(exponent or 0)) > LARGEST_EXPONENT:
            raise Refused(f"{written} is beyond 1e{LARGEST_EXPONENT}")
        return bounded(Fraction(written))

    def _name(self, node: ast.Name, depth: int) -> Value:
        if node.id in CONSTANTS:
            return CONSTANTS[node.id]
        if node.id in FUNCTIONS:
            raise Refused(f"{node.id} is a function: write {node.id}(...)")
        return symbol(node.id)

    def _unary(self, node: ast.UnaryOp, depth: int) -> Value:
        if not isinstance(node.op, (ast.USub, ast.UAdd)):
            raise Refused(f"{type(node.op).__name__} has no place in an expression")
        value = _single(self.value(node.operand, depth))
        return -value if isinstance(node.op, ast.USub) else value

    def _binary(self, node: ast.BinOp, depth: int) -> Value:
        if type(node.op) not in OPERATORS:
            raise Refused(f"{type(node.op).__name__} has no place in an expression")
        left = _single(self.value(node.left, depth))
        right = _single(self.value(node.right, depth))
        if isinstance(node.op, ast.Pow):
            return power_of(left, right)
        if is_number(left) and is_number(right):
            return OPERATORS[type(node.op)](left, right)
        return _SYMBOLIC[type(node.op)](as_sympy(left), as_sympy(right))

    def _comparison(self, node: ast.Compare, depth: int) -> Value:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARISONS:
            raise Refused("one comparison at a time: ==, !=, <, <=, > or >=")
        left = _single(self.value(node.left, depth))
        right = _single(self.value(node.comparators[0], depth))
        return _COMPARISONS[type(node.ops[0])](left, right)

    def _call(self, node: ast.Call, depth: int) -> Value:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise Refused(f"no function {ast.unparse(node.func)[:40]!r}; {_known()}")
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise Refused("functions take plain arguments only")
        function = FUNCTIONS[node.func.id]
        if not function.fewest <= len(node.args) <= function.most:
            raise Refused(f"{node.func.id} takes {function.takes}")
        return function.run(*(self.value(argument, depth) for argument in node.args))

    def _list(self, node: ast.List | ast.Tuple, depth: int) -> Value:
        return [self.value(element, depth) for element in node.elts]


def _single(value: Value) -> Value:
    if isinstance(value, (list, dict, bool)) or not hasattr(value, "__add__"):
        raise Refused("an operator needs numbers or symbols on both sides")
    return value


def _known() -> str:
    return "there are " + ", ".join(sorted(FUNCTIONS))


def _divide(left: Number, right: Number) -> Number:
    return bounded(Fraction(left) / right)


def _equal(left: Value, right: Value) -> Value:
    if is_number(left) and is_number(right):
        return left == right
    return FUNCTIONS["equation"].run(left, right)


def _compare(compare: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    return lambda left, right: compare(*map(_comparable, (left, right)))


def _comparable(value: Value) -> Value:
    return value if is_number(value) else as_sympy(value)


OPERATORS: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: lambda left, right: bounded(left + right),
    ast.Sub: lambda left, right: bounded(left - right),
    ast.Mult: product,
    ast.Div: _divide,
    ast.FloorDiv: lambda left, right: bounded(left // right),
    ast.Mod: lambda left, right: bounded(left % right),
    ast.Pow: product,  # not reached: powers have their own way
}
_SYMBOLIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Eq: _equal,
    ast.NotEq: _compare(operator.ne),
    ast.Lt: _compare(operator.lt),
    ast.LtE: _compare(operator.le),
    ast.Gt: _compare(operator.gt),
    ast.GtE: _compare(operator.ge),
}
