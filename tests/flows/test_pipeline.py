"""The flow through Prefect: order, parallel branches, retries, stops, told by the stages' marks."""

import dataclasses
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from flows.environment import prepare_environment
from flows.plan import Node, read_nodes
from flows.stage_process import Outcome, StageFailed, StageRunner, StageStopped
from tests.flows.project import NODES, Project, processes_in, wait_for

pytestmark = pytest.mark.slow
LEAVES = NODES[1:3]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """flows.pipeline, imported when Prefect's files are to lie in a folder of the tests."""
    before = dict(os.environ)
    prepare_environment(tmp_path_factory.mktemp("home"))
    import flows.pipeline

    yield flows.pipeline
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def server(pipeline: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The same, with one server for all tests that ask for it."""
    with pipeline.prefect_server(tmp_path_factory.mktemp("server")):
        yield pipeline


def work_on(pipeline: ModuleType, project: Project, **options: object) -> SimpleNamespace:
    """The work on all nodes, and what its callbacks were told."""
    told = SimpleNamespace(started=[], finished=[], failed=[])

    def failed(node: Node, error: Exception) -> None:
        told.failed.append((node.name, error))

    told.runner = StageRunner(project.root, "token", verbose=False)
    told.work = pipeline.Work(
        nodes=read_nodes(project.root),
        runner=told.runner,
        **{"parallel": 2, "retries": 2, "retry_after_s": 0, **options},
        on_start=lambda node: told.started.append(node.name),
        on_finish=lambda outcome: told.finished.append((outcome.node.name, outcome.state)),
        on_failure=failed,
    )
    return told


def run(pipeline: ModuleType, project: Project, **options: object) -> list[Outcome]:
    return pipeline.run_flow(work_on(pipeline, project, **options).work, project.root)


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.node.name: outcome.state for outcome in outcomes}


def most_at_once(marks: list[str]) -> int:
    """How many stages ran at the same time, at most."""
    running, most = 0, 0
    for mark in marks:
        running += 1 if mark.startswith("start") else -1
        most = max(most, running)
    return most


# --- order and parallel branches -------------------------------------------------------------


def test_runs_are_told_to_the_server_that_was_started(server: ModuleType, fresh: Project) -> None:
    run(server, fresh)
    request = urllib.request.Request(
        f"{os.environ['PREFECT_API_URL']}/flow_runs/count",
        b"{}",
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer) >= 1


@pytest.mark.parametrize("parallel", [1, 2])
def test_each_stage_runs_behind_its_inputs_and_never_more_than_allowed(
    server: ModuleType, fresh: Project, parallel: int
) -> None:
    fresh.set(teachers=["smollm2-135m", "mamba-130m", "qwen3-8b"])
    fresh.hold()
    names = ["seed", "leaf@mamba-130m", "leaf@qwen3-8b", "leaf@smollm2-135m", "join"]
    if parallel > 1:
        for leaf in names[1:4]:  # whichever starts first waits for a second
            fresh.trouble(leaf, "meet")
    outcomes = run(server, fresh, parallel=parallel)
    assert list(states(outcomes).items()) == [(name, "ran") for name in names]
    marks = fresh.marks()
    assert marks[:2] == ["start seed", "end seed"]
    assert marks[-2:] == ["start join", "end join"]
    assert most_at_once(marks) == parallel
    assert fresh.value("join") == 3 * 2**3 and len(marks) == 10


def test_callbacks_are_told_of_every_start_and_end(server: ModuleType, fresh: Project) -> None:
    told = work_on(server, fresh)
    server.run_flow(told.work, fresh.root)
    assert told.started[0] == "seed" and set(told.started[1:3]) == set(LEAVES)
    assert sorted(told.finished) == sorted((name, "ran") for name in NODES)
    assert told.failed == []


def test_what_is_not_stale_starts_no_process(server: ModuleType, finished: Project) -> None:
    count = len(finished.marks())
    told = work_on(server, finished)
    outcomes = server.run_flow(told.work, finished.root)
    assert states(outcomes) == dict.fromkeys(NODES, "reused")
    assert told.started == [] and len(finished.marks()) == count
    assert not (finished.root / "scratch" / "logs").exists()


def test_only_the_stale_and_what_follows_it_runs(server: ModuleType, finished: Project) -> None:
    path = finished.root / "registry" / "teachers.yaml"
    facts = yaml.safe_load(path.read_text())
    facts["mamba-130m"]["licence"] = "MIT"
    path.write_text(yaml.safe_dump(facts))
    finished.set(join={"value": 4})
    count = len(finished.marks())
    outcomes = states(run(server, finished))
    assert outcomes == {
        "seed": "reused", "leaf@mamba-130m": "ran", "leaf@smollm2-135m": "reused", "join": "ran"
    }  # fmt: skip
    assert len(finished.marks()) == count + 4 and finished.value("join") == 16


def test_a_stage_whose_input_came_out_the_same_does_not_run(
    server: ModuleType, finished: Project
) -> None:
    with (finished.root / "stages" / "leaf" / "stage.py").open("a") as file:
        file.write("# no change of the result\n")
    count = len(finished.marks())
    outcomes = states(run(server, finished))
    assert outcomes["join"] != "ran" and {outcomes[leaf] for leaf in LEAVES} == {"ran"}
    assert "start join" not in finished.marks()[count:]


# --- failures and retries --------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["MemoryError", "ConnectionError", "SIGKILL"])
def test_what_may_pass_is_tried_again(server: ModuleType, fresh: Project, trouble: str) -> None:
    fresh.trouble("seed", trouble)
    told = work_on(server, fresh)
    assert states(server.run_flow(told.work, fresh.root)) == dict.fromkeys(NODES, "ran")
    assert fresh.marks().count("start seed") == 2
    assert [name for name, _ in told.failed] == ["seed"]


def test_what_cannot_pass_is_tried_once_and_raised_with_its_reason(
    server: ModuleType, fresh: Project
) -> None:
    fresh.trouble("seed", "ValueError")
    told = work_on(server, fresh)
    with pytest.raises(StageFailed, match="^seed: as was asked$"):
        server.run_flow(told.work, fresh.root)
    assert fresh.marks() == ["start seed"]
    assert told.started == ["seed"] and told.finished == []


def test_retries_come_to_an_end(server: ModuleType, fresh: Project) -> None:
    fresh.trouble("seed", *["MemoryError"] * 9)
    with pytest.raises(StageFailed, match="^seed: out of memory"):
        run(server, fresh, retries=1)
    assert fresh.marks() == ["start seed"] * 2


def test_a_failure_leaves_its_sibling_to_finish_and_starts_nothing_behind_it(
    server: ModuleType, fresh: Project
) -> None:
    fresh.hold()
    fresh.trouble("leaf@smollm2-135m", "meet")
    fresh.trouble("leaf@mamba-130m", "ValueError")
    told = work_on(server, fresh)
    with pytest.raises(StageFailed, match="^leaf@mamba-130m: as was asked$"):
        server.run_flow(told.work, fresh.root)
    assert ("leaf@smollm2-135m", "ran") in told.finished
    assert "end leaf@smollm2-135m" in fresh.marks() and "start join" not in fresh.marks()
    assert {node.name for node in read_nodes(fresh.root) if node.is_stale} == {
        "leaf@mamba-130m", "join"
    }  # fmt: skip
    count = len(fresh.marks())
    assert states(run(server, fresh))["leaf@smollm2-135m"] == "reused"
    assert len(fresh.marks()) == count + 4


# --- stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stages_with_checkpoints_and_the_next_run_goes_on(
    server: ModuleType, fresh: Project, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    fresh.set(leaf={"steps": 300})
    fresh.hold()

    def interrupt() -> None:
        curves = fresh.root.glob
        wait_for(lambda: len(list(curves("scratch/leaf@*/*/metrics.jsonl"))) == 2, "both leaves")
        wait_for(lambda: all(p.stat().st_size for p in curves("scratch/leaf@*/*/m*")), "steps")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    told = work_on(server, fresh)
    with pytest.raises(StageStopped, match="leaf@.*: stopped at step .* of 300"):
        server.run_flow(told.work, fresh.root)
    thread.join()
    assert signal.getsignal(number) == before
    assert "start join" not in fresh.marks() and not processes_in(fresh.root)
    assert [name for name, _ in told.failed if name in LEAVES], "nobody told of the stop"
    fresh.let_go()
    assert states(run(server, fresh)) == {**dict.fromkeys(NODES, "ran"), "seed": "reused"}
    for leaf in LEAVES:
        log = (fresh.root / "scratch" / "logs" / f"{leaf}.log").read_text()
        assert "going on from step" in log


# --- the server ------------------------------------------------------------------------------


def test_the_runs_are_in_the_server_that_was_named(server: ModuleType, finished: Project) -> None:
    run(server, finished)
    request = urllib.request.Request(
        f"{os.environ['PREFECT_API_URL']}/flow_runs/filter",
        data=json.dumps({"sort": "START_TIME_DESC", "limit": 1}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        (last,) = json.load(answer)
    assert last["state_type"] == "COMPLETED"
    assert last["parameters"] == {"project": finished.root.name}


def test_a_server_of_our_own_is_the_only_one_and_ends_with_the_flow(
    pipeline: ModuleType, fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    seen: list[str] = []
    work = dataclasses.replace(
        work_on(pipeline, fresh).work,
        on_start=lambda _node: seen.append(" ".join(processes_in(fresh.root).values())),
    )
    assert states(pipeline.run_flow(work, fresh.root)) == dict.fromkeys(NODES, "ran")
    assert "PREFECT_API_URL" not in os.environ
    assert all(line.count("prefect") == 1 for line in seen), seen
    wait_for(lambda: not processes_in(fresh.root), "the end of the server")
