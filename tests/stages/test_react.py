"""ReAct traces: what the tables say, the tools would say too."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from stages.formats.conversations import Conversation, calls_in
from stages.prepare.react import TASKS, react_traces, tasks

SPLITS = ("training", "heldout")


def steps_of(told: Conversation) -> list[tuple[str, dict, object]]:
    """Tool, arguments and result of each call."""
    steps = []
    for position, (kind, text) in enumerate(told.segments):
        if kind == "result":
            own = told.segments[position - 1][1]
            ((start, _),) = calls_in(own)
            name, _, arguments = own[start:].removeprefix("<<").partition(">>")
            steps.append((name, json.loads(arguments), json.loads(text.removeprefix("<<result>>"))))
    return steps


def run(tool: str, arguments: dict, folder: Path) -> object:
    """Carry out a call of our own making, apart from the tables and from the tools."""
    if tool == "bash":
        for name, text in arguments["files"].items():
            (folder / name).write_text(text, encoding="utf-8")
        command = ["bash", "-c", arguments["command"]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.removesuffix("\n")
    code = arguments["code"] if tool == "py" else arguments["expression"]
    *first, last = code.split("\n")
    names: dict[str, object] = {}
    exec("\n".join(first), names)
    return eval(last, names)


@pytest.mark.parametrize("split", SPLITS)
def test_every_result_is_what_its_call_gives(split: str, tmp_path: Path) -> None:
    traces = react_traces(split, 2 * len(TASKS), seed=0)
    assert Counter(told.facts["task"] for told in traces) == dict.fromkeys(TASKS, 2)
    for told in traces:
        steps = steps_of(told)
        assert len(steps) == told.facts["steps"] >= 1
        for tool, arguments, result in steps:
            assert run(tool, arguments, tmp_path) == result, (arguments, result)
        assert told.answer == str(steps[-1][2])
        assert told.segments[-1][1].endswith(f"\nFINAL: {told.answer}")


def test_every_tool_is_used_and_some_tasks_use_two() -> None:
    tools = {name: {step["tool"] for step in entry["steps"]} for name, entry in tasks().items()}
    assert set(tasks()) == set(TASKS)
    assert set().union(*tools.values()) == {"calc", "py", "bash"}
    assert {"bash", "calc"} in tools.values()


def test_held_out_questions_are_none_of_training() -> None:
    for name, entry in tasks().items():
        assert len(entry["training"]) >= 3 and entry["heldout"], name
        assert not set(entry["training"]) & set(entry["heldout"])


@pytest.mark.parametrize("split", SPLITS)
def test_traces_think_before_they_act_and_are_filled_in(split: str) -> None:
    for told in react_traces(split, 60, seed=1):
        own = [text for kind, text in told.segments if kind == "own"]
        assert all(text.startswith("Thought: ") for text in own)
        assert all("\nAction: <<" in text for text in own[:-1])
        assert "{" not in told.prompt


def test_a_seed_gives_the_same_traces_and_no_question_twice() -> None:
    first, again, other = (react_traces("training", 300, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({told.prompt for told in first}) == 300
