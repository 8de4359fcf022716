"""What people read: durations, time left, the plan, the result."""

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from flows.console import Estimate, ProgressView, _note, duration, plan_table, result_table
from flows.plan import Node
from flows.stage_process import Outcome
from tests.flows.project import wait_for

CHANGED = ("seed.value 1 -> 2",)


def node(name: str, *upstream: str, reasons: tuple = (), restorable: bool = False) -> Node:
    return Node(
        name=name,
        stage=name.split("@")[0],
        description=f"what {name} does",
        headline="value",
        upstream=upstream,
        reasons=reasons,
        restorable=restorable,
        out=f"artifacts/{name}",
        metrics=f"metrics/{name}.json",
    )


def cells(table: Table) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


def printed(table: Table, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


# --- durations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (0.4, "0 s"), (42, "42 s"), (59.4, "59 s"), (60, "1 min 00 s"),
        (200, "3 min 20 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min"),
        (90_061, "25 h 01 min"),
    ],
)  # fmt: skip
def test_a_duration_is_said_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize("limit", [60, 3600])
def test_a_duration_is_never_sixty_of_a_unit(limit: int) -> None:
    said = {duration(limit - 1 + part / 100) for part in range(101)}
    assert not {text for text in said if "60 " in text}, said


# --- estimates -------------------------------------------------------------------------------


def estimate_at(elapsed_s: float) -> Estimate:
    """a took twice what was expected, b has been running for a while, c is to come."""
    estimate = Estimate({"a": 10.0, "b": 30.0, "c": 5.0})
    estimate.took["a"] = 20.0
    estimate.began["b"] = time.monotonic() - elapsed_s
    return estimate


def test_without_experience_the_pace_is_as_expected() -> None:
    assert Estimate({"a": 10.0}).pace == 1.0


def test_what_was_slow_so_far_slows_the_rest() -> None:
    estimate = estimate_at(elapsed_s=15)
    assert estimate.pace == 2.0
    assert estimate.left_s("b", None) == pytest.approx(60 - 15, abs=0.5)
    assert estimate.all_left_s({"b": None}, {"c"}) == pytest.approx(45 + 10, abs=0.5)


@pytest.mark.parametrize(("took", "pace"), [(1e6, 4.0), (0.001, 0.25)])
def test_one_odd_stage_does_not_make_the_pace_absurd(took: float, pace: float) -> None:
    estimate = estimate_at(0)
    estimate.took["a"] = took
    assert estimate.pace == pace


def test_a_late_stage_has_no_negative_time_left() -> None:
    assert estimate_at(elapsed_s=1000).left_s("b", None) == 0.0


def test_a_stages_own_steps_are_believed_when_they_say_more() -> None:
    assert estimate_at(elapsed_s=1000).left_s("b", 77.0) == 77.0


def test_nothing_running_and_nothing_to_come_leaves_nothing() -> None:
    assert Estimate({"a": 10.0}).all_left_s({}, set()) == 0.0


# --- the plan --------------------------------------------------------------------------------


def verdicts(nodes: list[Node], chosen: list[Node] | None = None) -> dict[str, tuple[str, str]]:
    """What the plan says of each node, and why."""
    rows = cells(plan_table(nodes, nodes if chosen is None else chosen, {}))
    return {row[0]: (row[1], row[2]) for row in rows}


def test_a_plan_says_run_for_the_stale_and_reuse_for_the_rest() -> None:
    found = verdicts([node("seed"), node("other", reasons=CHANGED)])
    assert found == {"seed": ("reuse", "nothing changed"), "other": ("run", CHANGED[0])}


def test_a_plan_says_restore_for_what_the_run_cache_has() -> None:
    assert verdicts([node("seed", reasons=CHANGED, restorable=True)])["seed"][0] == "restore"


def test_behind_what_runs_it_depends_on_what_comes_out() -> None:
    nodes = [node("seed", reasons=CHANGED), node("leaf", "seed"), node("join", "leaf")]
    assert verdicts(nodes) == {
        "seed": ("run", CHANGED[0]),
        "leaf": ("run", "if the output of seed changes"),
        "join": ("run", "if the output of leaf changes"),
    }


def test_behind_what_changes_nothing_is_promised_to_be_restored() -> None:
    nodes = [
        node("seed", reasons=CHANGED),
        node("leaf", "seed", reasons=("leaf.value 1 -> 2",), restorable=True),
    ]
    assert verdicts(nodes)["leaf"] == ("run", "if the output of seed changes")


def test_what_has_reasons_of_its_own_runs_for_these_whatever_comes_before() -> None:
    nodes = [node("seed", reasons=CHANGED), node("leaf", "seed", reasons=("never ran",))]
    assert verdicts(nodes)["leaf"] == ("run", "never ran")


def test_what_was_not_asked_for_is_left_alone_and_moves_nothing() -> None:
    nodes = [node("seed", reasons=CHANGED), node("leaf", "seed")]
    assert verdicts(nodes, nodes[1:]) == {
        "seed": ("leave", "not asked for"),
        "leaf": ("reuse", "nothing changed"),
    }


def test_many_reasons_are_cut_and_said_to_be() -> None:
    why = verdicts([node("seed", reasons=("one", "two", "three", "four"))])["seed"][1]
    assert "one" in why and "four" not in why and why.endswith("...")


def test_a_plan_tells_time_and_memory_and_admits_what_it_does_not_know() -> None:
    ledger = {"seed": {"time": "~ 10 s", "memory": "~ 0.5 GiB"}}
    rows = cells(plan_table([node("seed"), node("leaf")], [node("seed")], ledger))
    assert rows[0][3:] == ("~ 10 s", "~ 0.5 GiB") and rows[1][3:] == ("?", "?")


def test_a_value_in_brackets_is_shown_as_it_is() -> None:
    """rich takes [words] for markup."""
    reason = "prepare.datasets ['python-docs', 'arithmetic'] -> ['arithmetic']"
    assert reason in printed(plan_table([node("seed", reasons=(reason,))], [node("seed")], {}))


# --- the result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "value 1,234,567"), (0.123456, "value 0.1235"), (0, "value 0"), (3.0, "value 3")],
)
def test_a_result_shows_the_number_that_stands_for_a_stage(
    tmp_path: Path, value: float, shown: str
) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "seed.json").write_text(json.dumps({"value": value, "other": 9}))
    (row,) = cells(result_table([Outcome(node("seed"), "ran", 200.0)], tmp_path))
    assert row == ("seed", "3 min 20 s", "ran", shown)


def test_a_result_shows_no_time_for_what_did_not_run(tmp_path: Path) -> None:
    outcomes = [Outcome(node("seed"), "reused"), Outcome(node("leaf"), "restored", 3.0)]
    assert cells(result_table(outcomes, tmp_path)) == [
        ("seed", "", "reused", ""), ("leaf", "", "restored", "")
    ]  # fmt: skip


# --- while it runs ---------------------------------------------------------------------------


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProgressView]:
    """Make a view of `seed`, drawn for a terminal or not, on a console that is a string."""
    monkeypatch.setattr("flows.console.PLAIN_EVERY_S", 0.0)

    def make(terminal: bool, metrics_path: Callable | None = None) -> ProgressView:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        path = metrics_path or (lambda _node: tmp_path / "metrics.jsonl")
        return ProgressView(console, [node("seed")], Estimate({"seed": 10.0}), path)

    return make


def line(step: int, phase: str = "main") -> str:
    return json.dumps({"phase": phase, "step": step, "total": 10, "time_s": 100.0 + step, "kl": 2})


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "text",
    ["", line(1) + "\n", line(1) + "\n" + line(2) + "\n", line(1) + '\n{"phase": "ma', '{"pha'],
)
def test_a_view_lives_on_whatever_a_curve_holds_at_the_moment(
    tmp_path: Path, show: Callable, terminal: bool, text: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with show(terminal) as view:
        view.started(node("seed"))
        time.sleep(1.2)  # two looks
        assert view._thread.is_alive()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_view_lives_on_when_a_stage_ends_while_it_looks(show: Callable, terminal: bool) -> None:
    looked = threading.Event()

    def finish_meanwhile(found: Node) -> None:
        if not looked.is_set():
            looked.set()
            view.finished(Outcome(found, "ran", 1.0), "done")

    with show(terminal, finish_meanwhile) as view:
        view.started(node("seed"))
        wait_for(looked.is_set, "a look")
        time.sleep(0.6)
        assert view._thread.is_alive()


def test_a_view_lives_on_when_a_curve_is_cleared_away_while_it_looks(show: Callable) -> None:
    looks: list[Node] = []

    def vanish(found: Node) -> None:
        looks.append(found)
        raise FileNotFoundError("scratch/seed/0123456789abcdef")  # what stat() says then

    with show(False, vanish) as view:
        view.started(node("seed"))
        wait_for(lambda: len(looks) > 1 or not view._thread.is_alive(), "two looks")
        assert view._thread.is_alive()


def test_what_was_seen_last_stays_when_a_stages_scratch_is_cleared_away(
    tmp_path: Path, show: Callable
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line(9)}\n{line(10)}\n")
    with show(False) as view:
        view.started(node("seed"))
        wait_for(lambda: "seed" in view._seen, "a look")
        (tmp_path / "metrics.jsonl").unlink()
        assert _note(view._last_line("seed")) == "main 10/10, finishing  kl 2"


def test_without_a_terminal_a_line_tells_step_and_time_left(tmp_path: Path, show: Callable) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line(9, 'warm')}\n{line(3)}\n{line(4)}\n")
    with show(False) as view:
        view.started(node("seed"))
        wait_for(lambda: "whole run" in view.console.file.getvalue(), "a line")
        view.finished(Outcome(node("seed"), "ran", 1.0), "done in 1 s")
    said = view.console.file.getvalue()
    assert "seed: started (what seed does)" in said and "seed: done in 1 s" in said
    assert "seed: main 4/10, 6 s left  kl 2" in said
