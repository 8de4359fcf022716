"""GSM8K's calculator annotations as calls (Cobbe et al. 2021, openai/gsm8k).

    ... sold 48/2 = <<48/2=24>>24 clips   becomes   ... sold 48/2 = <<calc>>{"expression": "48/2"}
                                                    <<result>>24
                                                    24 clips
    #### 24                               becomes   FINAL: 24

An annotation that computes nothing (<<5=5>>) becomes plain text. A problem is left out where an
annotation is not exactly its expression's value (a rounded third), or where there is no call: from
it nobody would learn that a calculator can be relied upon.
"""

import ast
import hashlib
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from stages.formats.conversations import BadConversation, Conversation
from stages.prepare.traces import Step, final, trace

ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
ANSWER = re.compile(r"\n#### (-?[\d,]+(?:\.\d+)?)\s*$")
IDLE = re.compile(r"<<([\d.]+)=\1>>")
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def conversation_of(question: str, solution: str) -> Conversation | None:
    """A problem as a conversation; None where its annotations cannot be relied upon.

    Raises BadConversation for a row that is not GSM8K's.
    """
    answer = ANSWER.search(solution)
    if answer is None:
        raise BadConversation(f"no '#### answer' ends the solution of {question[:60]!r}")
    steps, at = [], 0
    body = IDLE.sub("", solution[: answer.start()])
    for match in ANNOTATION.finditer(body):
        value, written = exact_value(match[1]), exact_value(match[2])
        if value is None or value != written:
            return None
        result = value.numerator if value.denominator == 1 else float(value)
        expression = match[1].replace(" ", "")
        steps.append(Step(body[at : match.start()], "calc", {"expression": expression}, result))
        at = match.end()
    if not steps:
        return None
    right = answer[1].replace(",", "")
    closing = f"{body[at:].rstrip()}\n{final(right)}"
    id = hashlib.sha256(question.encode()).hexdigest()[:16]
    segments = trace(question, steps, closing)
    facts = {"operation": "several" if len(steps) > 1 else "one", "steps": len(steps)}
    return Conversation(id, "arithmetic", segments, right, facts)


def exact_value(expression: str) -> Fraction | None:
    """The value of an expression of numbers, + - * / and brackets; None for anything else."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except (SyntaxError, ZeroDivisionError):
        return None


def _value(node: ast.expr, text: str) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(text, node).replace("_", ""))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, text)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, text), _value(node.right, text)
        return None if None in (left, right) else OPERATORS[type(node.op)](left, right)
    return None
