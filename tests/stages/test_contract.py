"""The stage contract: whatever happens to a stage, its result is right, whole, or not there."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.stages.project import BAD_INPUT, DONE, Project, assert_same_result

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


def test_what_a_killed_write_left_is_cleared_away_before_more_is_written(project: Project) -> None:
    """safetensors writes to .tmpXXXXXX and renames it; a kill between leaves that behind."""
    job = project.job()
    torn = job.output / "deeper" / ".tmpvtLQGe"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    kept = torn.with_name("shard.safetensors")
    kept.write_bytes(b"whole")
    project.job()
    assert not torn.exists() and kept.exists()


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
