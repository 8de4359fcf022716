"""What of Python a program may say: RestrictedPython's rules, and guards on what grows fast.

RestrictedPython takes the language down to names without underscores, guarded attributes and no
imports of its own. On top of that:

- `*`, `**`, `%` and `<<`, in place too, go through a function that judges the size of the result
  before it is computed
- `counts[word] += 1` and `self.n += 1` are allowed where reading the target twice does no harm
- `nonlocal` and annotated names are allowed
- the value of a last line that is an expression is kept
"""

import ast
import copy
from types import CodeType

from RestrictedPython import RestrictingNodeTransformer, compile_restricted_exec

LAST_VALUE = "_last_value"  # a name that no program can write
GUARDED = {ast.Mult: "*", ast.Pow: "**", ast.Mod: "%", ast.LShift: "<<"}
_OPERATORS = GUARDED | {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.MatMult: "@",
}
_HAS_EFFECTS = (ast.Call, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await)
MOST_ERRORS = 3  # told to the model


class Policy(RestrictingNodeTransformer):
    """RestrictedPython's policy with the changes that the module's docstring names."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """`a * b` becomes `_binary_("*", a, b)`."""
        node = self.node_contents_visit(node)
        if type(node.op) not in GUARDED:
            return node
        return _call("_binary_", GUARDED[type(node.op)], node.left, node.right, at=node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """`a[i] += b` becomes `a[i] = _inplacevar_("+=", a[i], b)`."""
        if any(isinstance(part, _HAS_EFFECTS) for part in ast.walk(node.target)):
            self.error(node, "write `a = a + b` here: the left side calls something")
            return node
        read = copy.deepcopy(node.target)
        read.ctx = ast.Load()
        value = _call(
            "_inplacevar_",
            _OPERATORS[type(node.op)] + "=",
            self.visit(read),
            self.visit(node.value),
            at=node,
        )
        return ast.copy_location(ast.Assign(targets=[self.visit(node.target)], value=value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """`x: int = 3` is `x = 3`; `x: int` is nothing."""
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        plain = ast.Assign(targets=[node.target], value=node.value)
        return self.visit(ast.copy_location(plain, node))

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.AST:
        """Allowed, for the program's own names."""
        for name in node.names:
            self.check_name(node, name)
        return node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """The last line's value goes to a name of ours."""
        node = super().visit_Module(node)
        if node.body and isinstance(last := node.body[-1], ast.Expr):
            name = ast.copy_location(ast.Name(LAST_VALUE, ast.Store()), last)
            node.body[-1] = ast.copy_location(ast.Assign(targets=[name], value=last.value), last)
        return ast.fix_missing_locations(node)


def compile_program(code: str) -> CodeType:
    """A program as code. Raises SyntaxError with what is not allowed, and in which line."""
    result = compile_restricted_exec(code, filename="<program>", policy=Policy)
    if result.code is None:
        raise SyntaxError("; ".join(str(error)[:200] for error in result.errors[:MOST_ERRORS]))
    return result.code


def _call(function: str, operator: str, left: ast.expr, right: ast.expr, at: ast.AST) -> ast.Call:
    call = ast.Call(
        func=ast.Name(function, ast.Load()),
        args=[ast.Constant(operator), left, right],
        keywords=[],
    )
    return ast.fix_missing_locations(ast.copy_location(call, at))
