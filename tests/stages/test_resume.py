"""Going on: an interrupted stage ends as if nothing had happened, and its curve too."""

import random
import signal
import time
from pathlib import Path

import pytest

import stages.contract
from stages.process import Stopped, StopRequest
from tests.stages.project import (
    DONE,
    STOPPED,
    Counter,
    Project,
    assert_same_result,
    checkpoints,
    make_project,
    wait_for,
)

INTERRUPTIONS = [
    "ValueError in step 5",
    "MemoryError after step 2",
    "KeyboardInterrupt in step 4",
    "SIGKILL in step 1",
    "SIGKILL in step 5",
    "SIGKILL after step 5",
    "SIGKILL after step 8",
    "SIGKILL at the end",
    "SIGTERM in step 1",
    "SIGTERM in step 8",
]


@pytest.mark.parametrize("trouble", INTERRUPTIONS)
def test_an_interrupted_stage_ends_with_the_same_bits(
    project: Project, undisturbed: Project, trouble: str
) -> None:
    assert project.run("walk", TROUBLE=trouble).returncode != DONE
    assert project.run("walk").returncode == DONE
    assert_same_result(project, undisturbed)


def test_a_stage_killed_again_and_again_at_random_ends_with_the_same_bits(tmp_path: Path) -> None:
    calm = make_project(tmp_path / "calm", steps=100, pace_s=0.004)
    calm.run("walk")
    project = make_project(tmp_path / "killed", steps=100, pace_s=0.004)
    chance = random.Random(7)
    for _ in range(3):
        known = checkpoints(project)
        process = project.start("walk")
        wait_for(lambda known=known: checkpoints(project) != known, "a step")
        time.sleep(chance.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
    assert project.run("walk").returncode == DONE
    assert_same_result(project, calm)


@pytest.mark.parametrize("trouble", ["ValueError in step 5", "SIGKILL in step 5"])
def test_a_stage_interrupted_before_its_first_checkpoint_has_each_step_once(
    project: Project, undisturbed: Project, trouble: str
) -> None:
    project.run("walk", TROUBLE=trouble, CHECKPOINT_EVERY_S="1000")
    assert project.run("walk").returncode == DONE
    assert_same_result(project, undisturbed)


def test_a_stage_of_two_phases_keeps_the_curve_of_both(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.contract, "CHECKPOINT_EVERY_S", 0.0)
    job = project.job()
    state = Counter()
    for phase, steps in (("first", (1, 2)), ("second", (1, 2))):  # interrupted in the second
        for step in steps:
            state.count += 1
            job.step_done(state, step, len(steps) if phase == "first" else 3, phase)
    job = project.job()
    assert job.resume(Counter(), "first").count == 2
    state = job.resume(Counter(), "second")
    assert state.count == 4
    job.step_done(state, 3, 3, "second")
    curve = [(line["phase"], line["step"]) for line in project.curve()]
    assert curve == [("first", 1), ("first", 2), ("second", 1), ("second", 2), ("second", 3)]


def test_a_noted_step_that_is_done_again_stands_in_the_curve_once(project: Project) -> None:
    for _ in range(2):  # the second time after an interruption
        job = project.job()
        for step in (1, 2):
            job.note("gaps", step, 2, explained=0.5 * step)
    curve = [(line["phase"], line["step"], line["explained"]) for line in project.curve()]
    assert curve == [("gaps", 1, 0.5), ("gaps", 2, 1.0)]


def test_going_on_says_from_where(project: Project) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 5")
    assert "going on from step 4" in project.run("walk").stdout


def test_going_on_does_not_repeat_a_step(project: Project) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 5")
    assert project.run("walk", TROUBLE="ValueError in step 4").returncode == DONE


def test_the_last_step_is_always_checkpointed(project: Project) -> None:
    project.run("walk", TROUBLE="SIGKILL after step 8", CHECKPOINT_EVERY_S="1000")
    assert "going on from step 8" in project.run("walk").stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_at_a_checkpoint(project: Project, name: str) -> None:
    done = project.run("walk", TROUBLE=f"{name} in step 5", CHECKPOINT_EVERY_S="1000")
    assert done.returncode == STOPPED
    outcome = project.outcome()
    assert outcome["state"] == "stopped"
    assert "stopped at step 5" in outcome["reason"] and "go on from there" in outcome["reason"]
    assert "going on from step 5" in project.run("walk").stdout


def test_a_second_signal_ends_a_stage_that_does_not_react(project: Project) -> None:
    process = project.start("walk", TROUBLE="wait in step 2")
    wait_for(lambda: "step-00000001" in checkpoints(project), "step 1")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_stop_asked_for_in_the_last_step_still_stops(project: Project) -> None:
    stop = StopRequest()
    stop.requested = True
    job = project.job(stop=stop)
    with pytest.raises(Stopped, match="stopped at step 3 of 3"):
        job.step_done(Counter(), 3, 3)
    assert project.job().resume(Counter()).count == 0
