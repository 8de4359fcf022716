"""Requests for Python code and questions about Python, from the standard library's own source.

Whole modules are held out, the same ones for both data sets, and what a held-out module shares
with another (posixpath and ntpath have much in common) does not train.
"""

from collections import Counter
from collections.abc import Callable

from stages.formats.conversations import Conversation
from stages.prepare.splits import Made, Rows, Wanted, hold_out_groups, shuffled
from stages.prepare.standard_library import Documented, documented
from stages.prepare.wordings import Wordings, read_wordings

LONGEST_SIGNATURE, LONGEST_SUMMARY = 100, 200  # characters
SHORTEST_ANSWER, LONGEST_ANSWER = 40, 600  # characters
MOST_OF_A_MODULE = 20  # that measure: one large module is not to be half of what is held out
NO_TASKS = {"main", "test", "demo"}  # their docstrings do not say what is to be written


def python_code(wanted: Wanted, rows: Rows) -> Made:
    """Functions to write from their signature and the first sentence about them."""
    del rows
    fit = [item for item in documented() if _is_task(item)]
    train, heldout = apart(fit, lambda item: (item.summary.lower(), item.code), wanted)
    wordings = read_wordings("python-code")
    return (
        [_code_task(item, wordings, False, wanted.seed) for item in train],
        [_code_task(item, wordings, True, wanted.seed) for item in heldout],
    )


def python_questions(wanted: Wanted, rows: Rows) -> Made:
    """Questions about functions and classes, answered by the first paragraph about them."""
    del rows
    fit = [
        item
        for item in documented()
        if SHORTEST_ANSWER <= len(item.paragraph) <= LONGEST_ANSWER and item.name not in NO_TASKS
    ]
    train, heldout = apart(fit, lambda item: (item.paragraph.lower(),), wanted)
    wordings = read_wordings("python-questions")
    return (
        [_question(item, wordings, False, wanted.seed) for item in train],
        [_question(item, wordings, True, wanted.seed) for item in heldout],
    )


def apart(
    items: list[Documented], marks: Callable[[Documented], tuple[str, ...]], wanted: Wanted
) -> tuple[list[Documented], list[Documented]]:
    """Give (train, held out) without twins: each mark stands once, held-out items first."""
    train, heldout = hold_out_groups(lambda item: item.top, items, wanted)
    seen: set[str] = set()
    kept_train, kept_heldout = [], []
    of_module: Counter[str] = Counter()
    for item in shuffled(lambda item: item.full_name, heldout, wanted.seed):
        if seen.isdisjoint(marks(item)) and of_module[item.top] < MOST_OF_A_MODULE:
            kept_heldout.append(item)
            of_module[item.top] += 1
        seen.update(marks(item))
    for item in shuffled(lambda item: item.full_name, train, wanted.seed):
        if seen.isdisjoint(marks(item)):
            kept_train.append(item)
        seen.update(marks(item))
    return kept_train[: wanted.train], kept_heldout[: wanted.heldout]


def _is_task(item: Documented) -> bool:
    return (
        item.code is not None
        and item.name not in NO_TASKS
        and len(item.signature) <= LONGEST_SIGNATURE
        and len(item.summary) <= LONGEST_SUMMARY
        and "```" not in item.code
    )


def _code_task(item: Documented, wordings: Wordings, heldout: bool, seed: int) -> Conversation:
    wording, is_new = wordings.choose(item.full_name, heldout, seed)
    asked = wording.format(name=item.name, signature=item.signature, summary=item.summary)
    return Conversation(
        id=item.full_name,
        capability="code",
        segments=(("prompt", asked), ("own", f"```python\n{item.code}\n```")),
        answer=None,
        facts={"module": item.module, "new_wording": is_new},
    )


def _question(item: Documented, wordings: Wordings, heldout: bool, seed: int) -> Conversation:
    wording, is_new = wordings.choose(item.full_name, heldout, seed)
    asked = wording.format(name=item.full_name, short=item.name, module=item.module)
    return Conversation(
        id=item.full_name,
        capability="docs",
        segments=(("prompt", asked), ("own", item.paragraph)),
        answer=None,
        facts={"module": item.module, "new_wording": is_new},
    )
