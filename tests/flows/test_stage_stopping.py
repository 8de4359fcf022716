"""A stage that is asked to stop keeps its work, and DVC ends by itself."""

import json
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest

import flows.stage_process
from flows.plan import read_nodes
from flows.stage_process import StageRunner, StageStopped
from tests.flows.nodes import node
from tests.flows.project import Project, processes_in, wait_for
from tests.flows.test_stage_process import run, start, steps


class Watched(StageRunner):
    """A runner of one stage, whose DVC process can be looked at."""

    def _start(self, *given) -> subprocess.Popen:
        self.dvc = super()._start(*given)
        return self.dvc


def test_a_stop_leads_to_a_checkpoint_from_which_it_goes_on(fresh: Project) -> None:
    fresh.set(seed={"steps": 500})
    fresh.hold()
    runner = Watched(fresh.root, "token", verbose=False)
    thread, results = start(runner, node(fresh, "seed"))
    wait_for(lambda: len(steps(fresh, "seed")) > 2, "some steps")
    runner.stop()
    thread.join()
    assert isinstance(results[0], StageStopped), results
    reached = steps(fresh, "seed")[-1]
    assert f"seed: stopped at step {reached} of 500" in str(results[0])
    assert not processes_in(fresh.root)
    assert runner.dvc.returncode > 0, "DVC was ended by a signal, perhaps while it wrote its locks"
    fresh.let_go()
    assert run(fresh, "seed").state == "ran"
    assert steps(fresh, "seed") == list(range(1, 501))
    assert f"going on from step {reached}" in runner.log_path(node(fresh, "seed")).read_text()


def test_a_stop_before_the_stage_has_begun_starts_nothing(fresh: Project) -> None:
    fresh.set(seed={"steps": 500})
    fresh.hold()
    runner = StageRunner(fresh.root, "token", verbose=False)
    thread, results = start(runner, node(fresh, "seed"))
    wait_for(lambda: processes_in(fresh.root), "a process")
    runner.stop()
    thread.join()
    assert isinstance(results[0], StageStopped), results
    assert not processes_in(fresh.root)


def test_after_a_stop_no_stage_starts(fresh: Project) -> None:
    runner = StageRunner(fresh.root, "token", verbose=False)
    runner.stop()
    with pytest.raises(StageStopped, match="seed: not started"):
        runner.run(node(fresh, "seed"))
    assert fresh.marks() == [] and not processes_in(fresh.root)


def test_a_stage_that_does_not_heed_the_stop_is_ended(
    fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.stage_process, "GRACE_S", 0.5)
    fresh.trouble("seed", "meet")  # waits for a sibling that never comes, without a step
    runner = StageRunner(fresh.root, "token", verbose=False)
    thread, results = start(runner, node(fresh, "seed"))
    wait_for(lambda: fresh.marks() == ["start seed"], "the stage")
    runner.stop()
    thread.join()
    assert isinstance(results[0], StageStopped), results
    wait_for(lambda: not processes_in(fresh.root), "the end of all processes")


def test_a_stop_ends_all_stages_that_run(fresh: Project) -> None:
    run(fresh, "seed")
    fresh.set(leaf={"steps": 500})
    fresh.hold()
    runner = StageRunner(fresh.root, "token", verbose=False)
    leaves = [n for n in read_nodes(fresh.root) if n.stage == "leaf"]
    started = [start(runner, leaf) for leaf in leaves]
    wait_for(lambda: all(steps(fresh, leaf.name) for leaf in leaves), "steps of both")
    runner.stop()
    for thread, results in started:
        thread.join()
        assert isinstance(results[0], StageStopped) and "stopped at step" in str(results[0])
    assert not processes_in(fresh.root)


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
def test_dvc_is_left_to_store_what_a_stage_has_finished(
    fresh: Project, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    runner, signals = StageRunner(fresh.root, "token"), []
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda *given: signals.append(given))
    outcome = fresh.root / "scratch" / "seed" / "outcome.json"
    outcome.parent.mkdir(parents=True)
    outcome.write_text(json.dumps({"token": "token", "state": state}))
    runner._ask_to_end(node(fresh, "seed"), SimpleNamespace(pid=1), {})
    assert signals == []
    outcome.write_text(json.dumps({"token": "an earlier one", "state": state}))
    runner._ask_to_end(node(fresh, "seed"), SimpleNamespace(pid=1), {})
    assert signals == [(1, signal.SIGTERM)], "DVC has not begun the stage"
