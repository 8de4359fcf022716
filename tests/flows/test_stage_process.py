"""One DVC stage in a process of its own: its end is told rightly, whatever it was; none is left."""

import json
import os
import signal
import threading
import uuid
from pathlib import Path

import pytest

from flows.plan import Node, read_nodes
from flows.stage_process import Outcome, StageFailed, StageRunner, StageStopped
from tests.flows.nodes import node
from tests.flows.project import Project, processes_in, wait_for

DRIVER = """
import sys
from pathlib import Path
from flows.plan import clear_dead_locks, read_nodes, repair_lockfile
from flows.stage_process import StageRunner
root = Path.cwd()
repair_lockfile(root)
clear_dead_locks(root)
(node,) = (node for node in read_nodes(root) if node.name == sys.argv[1])
print(StageRunner(root, "driver", verbose=False).run(node).state)
"""


def run(project: Project, name: str) -> Outcome:
    """Run a node as a run of its own would."""
    return StageRunner(project.root, uuid.uuid4().hex, verbose=False).run(node(project, name))


def start(runner: StageRunner, chosen: Node) -> tuple[threading.Thread, list]:
    """Run a node in a thread; the list gets its outcome or its error."""
    results: list[object] = []

    def work() -> None:
        try:
            results.append(runner.run(chosen))
        except (StageFailed, StageStopped) as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def steps(project: Project, name: str) -> list[int]:
    """The steps in the newest curve of a node; none before it has begun."""
    if not list((project.root / "scratch" / name).glob("*/metrics.jsonl")):
        return []
    lines = project.curve(name).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


# --- how it ended ----------------------------------------------------------------------------


def test_a_stage_that_ran_has_its_result_recorded_and_its_scratch_dropped(fresh: Project) -> None:
    outcome = run(fresh, "seed")
    assert outcome.state == "ran" and outcome.seconds > 0
    assert not node(fresh, "seed").is_stale and fresh.value("seed") == 1
    left = {path.name for path in (fresh.root / "scratch" / "seed").iterdir() if path.is_dir()}
    assert left == {"last"}, "work that is done with should have gone"
    assert {p.name for p in (fresh.root / "scratch/seed/last").iterdir()} == {
        "metrics.jsonl", "result.json"
    }  # fmt: skip
    assert steps(fresh, "seed") == [1, 2, 3, 4, 5]


def test_a_stage_of_a_teacher_runs_for_that_teacher_alone(fresh: Project) -> None:
    run(fresh, "seed")
    assert run(fresh, "leaf@mamba-130m").state == "ran"
    assert fresh.marks()[2:] == ["start leaf@mamba-130m", "end leaf@mamba-130m"]
    assert node(fresh, "leaf@smollm2-135m").is_stale


def test_a_result_in_the_run_cache_is_restored_without_running(fresh: Project) -> None:
    run(fresh, "seed")
    fresh.set(seed={"value": 2})
    assert run(fresh, "seed").state == "ran"
    fresh.set(seed={"value": 1})
    count = len(fresh.marks())
    outcome = run(fresh, "seed")
    assert (outcome.state, outcome.fingerprint) == ("restored", None)
    assert len(fresh.marks()) == count and fresh.value("seed") == 1


def test_what_is_up_to_date_does_not_run(finished: Project) -> None:
    count = len(finished.marks())
    assert run(finished, "seed").state != "ran"
    assert len(finished.marks()) == count


@pytest.mark.parametrize(
    ("trouble", "may_pass", "reason"),
    [
        ("ValueError", False, "seed: as was asked"),
        ("KeyError", False, "seed: KeyError: 'as was asked'"),
        ("MemoryError", True, "seed: out of memory"),
        ("ConnectionError", True, "seed: as was asked"),
        ("SIGKILL", True, "seed: its process was killed"),
        ("SIGSEGV", True, "seed: its process was killed"),
    ],
)
def test_a_failure_comes_with_the_stages_own_reason(
    fresh: Project, trouble: str, may_pass: bool, reason: str
) -> None:
    fresh.trouble("seed", trouble)
    with pytest.raises(StageFailed) as failure:
        run(fresh, "seed")
    assert str(failure.value).startswith(reason) and "\n" not in str(failure.value)
    assert failure.value.may_pass is may_pass
    assert node(fresh, "seed").is_stale and not (fresh.root / "artifacts/seed").exists()
    assert run(fresh, "seed").state == "ran", "the next start has no trouble"


def test_a_refused_parameter_is_named(fresh: Project) -> None:
    fresh.set(seed={"steps": 0})
    with pytest.raises(StageFailed, match="'steps' is 0; it must be at least 1") as failure:
        run(fresh, "seed")
    assert not failure.value.may_pass


def test_a_missing_input_names_the_stage_to_run_first(fresh: Project) -> None:
    with pytest.raises(StageFailed, match="artifacts/seed") as failure:
        run(fresh, "leaf@mamba-130m")
    assert not failure.value.may_pass


def test_a_broken_pipeline_file_gives_the_end_of_the_log(fresh: Project) -> None:
    chosen = node(fresh, "seed")
    (fresh.root / "dvc.yaml").write_text("stages: [unclosed")
    runner = StageRunner(fresh.root, "token", verbose=False)
    with pytest.raises(StageFailed, match="DVC failed.*dvc.yaml") as failure:
        runner.run(chosen)
    assert str(runner.log_path(chosen)) in str(failure.value)
    assert not failure.value.may_pass


@pytest.mark.parametrize("token", ["token", "another"])
def test_an_earlier_failure_is_not_told_again(fresh: Project, token: str) -> None:
    chosen = node(fresh, "seed")
    fresh.trouble("seed", "MemoryError")
    with pytest.raises(StageFailed, match="out of memory"):
        StageRunner(fresh.root, token, verbose=False).run(chosen)
    (fresh.root / "dvc.yaml").write_text("stages: [unclosed")
    with pytest.raises(StageFailed, match="DVC failed"):
        StageRunner(fresh.root, "token", verbose=False).run(chosen)


def test_two_stages_run_at_the_same_time(fresh: Project) -> None:
    run(fresh, "seed")
    runner = StageRunner(fresh.root, "token", verbose=False)
    started = []
    for name in ("leaf@mamba-130m", "leaf@smollm2-135m"):
        fresh.trouble(name, "meet")
        started.append(start(runner, node(fresh, name)))
    for thread, results in started:
        thread.join()
        assert results[0].state == "ran", results
    assert [n.name for n in read_nodes(fresh.root) if n.is_stale] == ["join"]


# --- kill -9 ---------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc")
def test_when_the_runner_is_killed_neither_dvc_nor_the_stage_is_left(fresh: Project) -> None:
    fresh.set(seed={"steps": 500})
    fresh.hold()
    process = fresh.start("-c", DRIVER, "seed")
    wait_for(lambda: steps(fresh, "seed"), "steps")
    running = " ".join(processes_in(fresh.root).values())
    assert "dvc" in running and "stages" in running, "there was nothing to leave behind"
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(fresh.root), "the end of all processes")


def test_a_stage_killed_again_and_again_ends_like_one_left_alone(fresh: Project) -> None:
    fresh.set(seed={"steps": 40})
    fresh.hold()
    for moment in (
        lambda: "repro" in " ".join(processes_in(fresh.root).values()),
        lambda: (fresh.root / "scratch" / "seed" / "outcome.json").exists(),
        lambda: len(steps(fresh, "seed")) > 3,
        lambda: "end seed" in fresh.marks(),
        lambda: (fresh.root / "artifacts" / "seed" / "manifest.json").exists(),
    ):
        process = fresh.start("-c", DRIVER, "seed")
        wait_for(moment, "the moment to kill")
        process.kill()
        process.communicate()
        wait_for(lambda: not processes_in(fresh.root), "the end of all processes")
    process = fresh.start("-c", DRIVER, "seed")
    said = process.communicate()
    assert said[0].strip() in {"ran", "restored"}, said
    assert fresh.marks().count("end seed") == 1, "work that was done was done again"
    assert fresh.value("seed") == 1 and steps(fresh, "seed") == list(range(1, 41))
    assert not node(fresh, "seed").is_stale


def test_dvc_killed_alone_takes_its_stage_along_and_is_told(fresh: Project) -> None:
    fresh.set(seed={"steps": 500})
    fresh.hold()
    runner = StageRunner(fresh.root, "token", verbose=False)
    thread, results = start(runner, node(fresh, "seed"))
    wait_for(lambda: steps(fresh, "seed"), "steps")
    (dvc,) = (pid for pid, line in processes_in(fresh.root).items() if "repro" in line)
    os.kill(dvc, signal.SIGKILL)
    thread.join()
    assert isinstance(results[0], StageFailed) and results[0].may_pass, results
    wait_for(lambda: not processes_in(fresh.root), "the end of all processes")
    fresh.let_go()
    assert run(fresh, "seed").state == "ran"
