"""The stage contract: whatever happens to a stage, its result is right, whole, or not there."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

import stages.contract
from stages.__main__ import may_pass, reason_of
from stages.checkpoint import newest_checkpoint, save_checkpoint
from stages.process import Stopped, StopRequest
from tests.tiny import REPOSITORY, Project, make_project

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose walk ran through; what every disturbed one has to equal."""
    project = make_project(tmp_path_factory.mktemp("undisturbed"))
    assert project.run("walk").returncode == DONE
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def assert_same_result(project: Project, other: Project) -> None:
    """The same published bytes, the same metrics and the same curve."""
    assert project.published() == other.published()
    assert project.published("metrics") == other.published("metrics")
    assert project.curve() == other.curve()


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until a condition holds; half a minute is far more than it ever takes."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def checkpoints(project: Project) -> set[str]:
    """The names of the checkpoints of `walk` there are now."""
    return {path.name for path in project.root.glob("scratch/walk/*/checkpoints/main/step-*")}


class Counter:
    """The smallest state: a number in a file."""

    def __init__(self) -> None:
        self.count = 0

    def save(self, folder: Path) -> None:
        (folder / "count.txt").write_text(str(self.count))

    def load(self, folder: Path) -> None:
        self.count = int((folder / "count.txt").read_text())


# --- inputs ----------------------------------------------------------------------------------


def test_an_undeclared_input_is_refused_naming_both_stages(project: Project) -> None:
    project.run("walk")
    project.set("total", opens="compare")
    done = project.run("total")
    assert done.returncode == BAD_INPUT
    reason = project.outcome("total")["reason"]
    assert "'total'" in reason and "'compare'" in reason and "dvc.yaml" in reason
    assert not (project.root / "artifacts/total").exists()


def test_a_missing_input_names_the_stage_to_run_first(project: Project) -> None:
    done = project.run("total")
    assert done.returncode == BAD_INPUT
    reason = project.outcome("total")["reason"]
    assert "'total'" in reason and "./run_pipeline.sh --stage walk" in reason


def test_an_input_that_was_never_completed_counts_as_missing(project: Project) -> None:
    folder = project.root / "artifacts/walk"
    folder.mkdir(parents=True)
    (folder / "walk.npy").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="--stage walk"):
        project.job("total")


def test_inputs_of_a_stage_that_runs_once_a_teacher_come_by_name(project: Project) -> None:
    project.run("walk")
    project.run("view", "ben")
    project.run("view", "ada")
    inputs = project.job("compare").inputs("view")
    assert list(inputs) == ["ada", "ben"]
    assert (inputs["ben"] / "view.txt").read_text() == "ben"


def test_a_publication_that_was_killed_half_way_is_no_input(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run("walk")
    project.run("view", "ada")
    before = project.job("compare").fingerprint
    job = project.job("view", "ben")
    (job.output / "view.txt").write_text("ben")
    job.complete({}, {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        job.publish()
    job = project.job("compare")
    assert list(job.inputs("view")) == ["ada"]
    assert job.fingerprint == before


def test_an_unknown_stage_lists_those_there_are(project: Project) -> None:
    done = project.run("wlak")
    assert done.returncode == BAD_INPUT
    assert "'wlak'" in done.stderr and "walk, total, view, compare" in done.stderr


@pytest.mark.parametrize("arguments", [("view",), ("walk", "ada")])
def test_a_teachers_name_is_asked_for_where_it_belongs(
    project: Project, arguments: tuple[str, ...]
) -> None:
    done = project.run(*arguments)
    assert done.returncode == BAD_INPUT
    assert "name" in done.stderr and f"stage '{arguments[0]}'" in done.stderr


# --- publication -----------------------------------------------------------------------------


def test_a_finished_stage_publishes_its_output_and_its_metrics(undisturbed: Project) -> None:
    assert set(undisturbed.published()) == {
        "artifacts/walk/manifest.json",
        "artifacts/walk/more/steps.txt",
        "artifacts/walk/walk.npy",
    }
    metrics = json.loads(undisturbed.published("metrics")["metrics/walk.json"])
    assert set(metrics) == {"distance", "steps"} and metrics["steps"] == 8
    assert undisturbed.steps() == list(range(1, 9))
    assert undisturbed.outcome()["state"] == "done"


def test_what_differs_from_run_to_run_is_kept_out_of_the_metrics(project: Project) -> None:
    job = project.job()
    job.measured(seconds=1.5)
    job.show("picture.png")
    job.complete({"loss": 0.5}, {"wall_s": 2.0})
    job.publish()
    assert json.loads(project.published("metrics")["metrics/walk.json"]) == {"loss": 0.5}
    result = json.loads((job.folder / "result.json").read_text())
    assert result["measured"] == {"seconds": 1.5, "wall_s": 2.0}
    assert result["shown"] == ["picture.png"]


@pytest.mark.parametrize(
    "trouble", ["ValueError in step 3", "ValueError at the end", "SIGKILL at the end"]
)
def test_nothing_is_published_on_failure(project: Project, trouble: str) -> None:
    assert project.run("walk", TROUBLE=trouble).returncode != DONE
    assert project.published() == {}
    assert project.published("metrics") == {}


def test_a_failure_leaves_the_earlier_publication_alone(project: Project) -> None:
    project.run("walk")
    before = project.published(), project.published("metrics")
    project.set("walk", seed=1)
    project.run("walk", TROUBLE="ValueError at the end")
    assert (project.published(), project.published("metrics")) == before


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_publication_is_all_or_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, at: int, earlier: bool
) -> None:
    if earlier:
        project.run("walk")
        project.set("walk", seed=1)
    before = (project.root / "artifacts/walk").exists() and project.published("artifacts/walk")
    job = project.job()
    for name in ("a.txt", "b.txt", "c.txt"):
        (job.output / name).write_text("new")
    job.complete({}, {})
    link, calls = os.link, []

    def failing_link(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises((OSError, shutil.Error)):
        patch.setattr(os, "link", failing_link)
        job.publish()
    assert len(calls) >= at
    after = (project.root / "artifacts/walk").exists() and project.published("artifacts/walk")
    assert after == before
    again = project.job()
    assert again.is_complete()
    again.publish()
    assert {Path(name).name for name in project.published()} == {
        "a.txt", "b.txt", "c.txt", "manifest.json",
    }  # fmt: skip


def test_what_was_complete_is_published_again_with_no_step(
    project: Project, undisturbed: Project
) -> None:
    project.run("walk")
    shutil.rmtree(project.root / "artifacts/walk")  # as DVC does before it runs a stage
    (project.root / "metrics/walk.json").unlink()
    done = project.run("walk", TROUBLE="ValueError in step 1")
    assert done.returncode == DONE
    assert "publishing it again" in done.stdout
    assert_same_result(project, undisturbed)


def test_published_files_outlive_the_work_they_were_made_from(project: Project) -> None:
    project.run("walk")
    before = project.published()
    shutil.rmtree(project.root / "scratch")
    assert project.published() == before


# --- going on --------------------------------------------------------------------------------

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


# --- the fingerprint -------------------------------------------------------------------------


def test_other_parameters_start_at_the_beginning_and_the_old_work_is_kept(
    project: Project, undisturbed: Project
) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 5")
    project.set("walk", seed=1)
    done = project.run("walk")
    assert "going on" not in done.stdout
    assert project.steps() == list(range(1, 9))
    assert project.published() != undisturbed.published()
    project.set("walk", seed=0)
    assert "going on from step 4" in project.run("walk").stdout
    assert_same_result(project, undisturbed)


def test_another_code_is_another_fingerprint(project: Project) -> None:
    before = project.job().fingerprint
    file = project.root / "stages/walk/stage.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert project.job().fingerprint != before


def test_another_input_is_another_fingerprint(project: Project) -> None:
    project.run("walk")
    before = project.job("total").fingerprint
    project.set("walk", seed=1)
    project.run("walk")
    assert project.job("total").fingerprint != before


def test_another_teacher_is_another_fingerprint(project: Project) -> None:
    project.run("walk")
    assert project.job("view", "ada").fingerprint != project.job("view", "ben").fingerprint


def test_a_section_of_another_stage_is_no_part_of_the_fingerprint(project: Project) -> None:
    before = project.job().fingerprint
    project.set("total", opens="other")
    file = project.root / "stages/total/stage.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert project.job().fingerprint == before


def test_unfinished_work_of_three_fingerprints_is_kept(project: Project) -> None:
    folders = []
    for seed in range(5):
        project.set("walk", seed=seed)
        folders.append(project.job().folder)
        os.utime(folders[-1], (seed, seed))
    assert [folder.exists() for folder in folders] == [False, False, True, True, True]


# --- checkpoints -----------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "position.npy"
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "position.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "position.npy").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:-9])


def scramble_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"\xff\xfe\x80 not text")


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"")


DAMAGES = [
    truncate,
    flip_a_bit,
    lose_a_file,
    lose_the_manifest,
    tear_the_manifest,
    scramble_the_manifest,
    empty_the_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    project: Project, undisturbed: Project, damage: Callable[[Path], None]
) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 6")
    (newest,) = project.root.glob("scratch/walk/*/checkpoints/main/step-00000005")
    damage(newest)
    done = project.run("walk")
    assert done.returncode == DONE, done.stderr
    assert "damaged checkpoint" in done.stdout and "step-00000005" in done.stdout
    assert "going on from step 4" in done.stdout
    assert_same_result(project, undisturbed)


def test_without_an_intact_checkpoint_a_stage_starts_over(
    project: Project, undisturbed: Project
) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 6")
    found = list(project.root.glob("scratch/walk/*/checkpoints/main/step-*"))
    assert len(found) == 2
    for checkpoint in found:
        truncate(checkpoint)
    done = project.run("walk")
    assert done.stdout.count("damaged checkpoint") == 2
    assert_same_result(project, undisturbed)


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 100):
        save_checkpoint(Counter(), tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_checkpoint_that_was_never_renamed_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(Counter(), tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.part")
    found, problems = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001" and problems == []


def test_a_state_that_cannot_be_saved_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    class Broken(Counter):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(Counter(), tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(Broken(), tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    save_checkpoint(Counter(), tmp_path, 2)  # what it left behind is not in the way
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000002", [])


# --- the process -----------------------------------------------------------------------------


def test_a_second_process_of_the_same_stage_is_refused(project: Project) -> None:
    first = project.start("walk", TROUBLE="wait in step 2")
    try:
        wait_for(lambda: "step-00000001" in checkpoints(project), "step 1")
        second = project.run("walk")
        assert second.returncode == FAILED
        assert "'walk' is already running" in second.stderr and str(first.pid) in second.stderr
        assert project.published() == {}
    finally:
        first.kill()
        first.communicate()
    assert project.run("walk").returncode == DONE  # a lock does not outlive its holder


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is a call of Linux")
def test_a_stage_dies_with_its_parent(project: Project) -> None:
    parent = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m stages walk; true"],
        cwd=project.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TROUBLE": "wait in step 2"},
    )
    wait_for(lambda: "step-00000001" in checkpoints(project), "step 1")
    pid = json.loads((project.root / "scratch/walk/lock").read_text())["pid"]
    assert pid != parent.pid
    parent.kill()
    parent.wait()

    def is_gone() -> bool:
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

    wait_for(is_gone, "the stage to die")


def test_a_token_of_the_caller_comes_back_in_the_outcome(project: Project) -> None:
    project.run("walk", NANOFOUNDRY_TOKEN="abc")
    outcome = project.outcome()
    assert outcome["token"] == "abc" and outcome["state"] == "done"
    assert outcome["fingerprint"].startswith(project.work()[-1].name)


def test_the_contract_needs_no_torch() -> None:
    code = "import sys, stages.__main__, stages.contract; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "retry", "code"),
    [
        ("MemoryError", True, FAILED),
        ("ConnectionError", True, FAILED),
        ("TimeoutError", True, FAILED),
        ("ValueError", False, BAD_INPUT),
        ("ZeroDivisionError", False, FAILED),
    ],
)
def test_a_failure_says_why_and_whether_to_try_again(
    project: Project, error: str, retry: bool, code: int
) -> None:
    done = project.run("walk", TROUBLE=f"{error} in step 3")
    outcome = project.outcome()
    assert done.returncode == code
    assert (outcome["state"], outcome["retry"]) == ("failed", retry)
    assert "as was asked" in outcome["reason"]
    assert outcome["reason"] in done.stderr


def test_a_bug_leaves_its_traceback_and_a_mistake_of_the_user_does_not(project: Project) -> None:
    assert "Traceback" in project.run("walk", TROUBLE="ZeroDivisionError in step 3").stderr
    assert "Traceback" not in project.run("walk", TROUBLE="ValueError in step 3").stderr


def test_a_full_disk_is_named(project: Project) -> None:
    done = project.run("walk", TROUBLE="ENOSPC in step 3")
    assert done.returncode == FAILED
    reason = project.outcome()["reason"]
    assert "disk is full" in reason and "walk.npy" in reason
    assert not project.outcome()["retry"]


@pytest.mark.parametrize(
    "error",
    [
        # as numpy and safetensors say it, measured on a full file system
        OSError("100000 requested and 8176 written"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_named_however_a_library_says_it(error: Exception) -> None:
    assert "disk is full" in reason_of(error)


def test_memory_that_torch_could_not_get_is_named_and_may_be_there_later() -> None:
    error = RuntimeError(  # as torch says it on a CPU
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    )
    assert "out of memory" in reason_of(error)
    assert may_pass(error)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("requests", "ConnectionError"),
        ("requests", "ReadTimeout"),
        ("httpx", "ConnectError"),
        ("httpx", "ReadError"),
        ("httpx", "ConnectTimeout"),
    ],
)
def test_a_lost_network_may_come_back_whatever_library_lost_it(package: str, name: str) -> None:
    error = getattr(pytest.importorskip(package), name)("as was asked")
    assert may_pass(error)


def test_a_reason_is_one_line() -> None:
    assert reason_of(ValueError("first\n  second")) == "first second"
    assert reason_of(KeyError("a\nb")).count("\n") == 0
    assert reason_of(MemoryError("a\nb")).count("\n") == 0


def test_an_unknown_teacher_is_refused_by_name(project: Project) -> None:
    project.run("walk")
    assert project.run("view", "ada").returncode == DONE
    done = project.run("view", "adda")
    assert done.returncode == BAD_INPUT, done.stderr
    assert "Traceback" not in done.stderr and "ada, ben" in done.stderr


def test_check_refuses_a_mistake_in_any_section(project: Project) -> None:
    assert project.run("--check").returncode == DONE
    project.set("total", oppens="walk")
    done = project.run("--check")
    assert done.returncode == BAD_INPUT
    assert "section 'total'" in done.stderr and "'oppens'" in done.stderr
