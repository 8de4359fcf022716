"""What kills and other teachers leave is mended or removed: dvc.lock, DVC's locks, outputs."""

import yaml

from flows.plan import (
    BrokenPipelineFile,
    clear_dead_locks,
    keep_lockfile,
    read_nodes,
    remove_strays,
    repair_lockfile,
)
from tests.flows.nodes import reasons, restorable
from tests.flows.project import NODES, Project, snapshot

# --- what a kill leaves ----------------------------------------------------------------------


def test_a_lockfile_cut_anywhere_is_restored_or_costs_the_cut_stage_alone(
    finished: Project,
) -> None:
    path = finished.root / "dvc.lock"
    whole = path.read_bytes()
    entries = yaml.safe_load(whole)
    keep_lockfile(finished.root)
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        repair_lockfile(finished.root)
        if yaml.safe_load(path.read_bytes()) == entries:
            continue
        try:
            stale = reasons(finished)
        except BrokenPipelineFile as error:
            raise AssertionError(f"cut at byte {length} of {len(whole)}: {error}") from error
        assert len(stale) <= 1, f"cut at byte {length}: {stale}"


def test_a_lockfile_that_somebody_deleted_is_not_brought_back(finished: Project) -> None:
    keep_lockfile(finished.root)
    (finished.root / "dvc.lock").unlink()
    assert repair_lockfile(finished.root) is None
    assert set(reasons(finished)) == set(NODES)


def test_an_emptied_lockfile_is_restored(finished: Project) -> None:
    keep_lockfile(finished.root)
    (finished.root / "dvc.lock").write_text("")
    assert "dvc.lock" in repair_lockfile(finished.root)
    assert reasons(finished) == {}


def test_a_whole_lockfile_is_left_alone(finished: Project) -> None:
    keep_lockfile(finished.root)
    before = snapshot(finished.root)
    assert repair_lockfile(finished.root) is None
    assert snapshot(finished.root) == before


def test_what_ran_since_the_copy_was_kept_is_not_undone_by_a_repair(finished: Project) -> None:
    keep_lockfile(finished.root)
    finished.set(seed={"value": 2})
    finished.dvc("repro", "-s", "seed")
    path = finished.root / "dvc.lock"
    entries = yaml.safe_load(path.read_text())["stages"]
    entries.pop("join")
    path.write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}))
    repair_lockfile(finished.root)
    assert set(reasons(finished)) == {"leaf@mamba-130m", "leaf@smollm2-135m"}


def test_without_a_kept_copy_a_repair_does_nothing(finished: Project) -> None:
    path = finished.root / "dvc.lock"
    path.write_bytes(path.read_bytes()[:500])
    before = snapshot(finished.root)
    assert repair_lockfile(finished.root) is None
    assert snapshot(finished.root) == before


def test_a_broken_lockfile_is_not_kept_as_good(finished: Project) -> None:
    keep_lockfile(finished.root)
    path = finished.root / "dvc.lock"
    whole = path.read_bytes()
    for bad in (b"", b"stages: [", whole[:1]):
        path.write_bytes(bad)
        keep_lockfile(finished.root)
    repair_lockfile(finished.root)
    assert yaml.safe_load(path.read_bytes()) == yaml.safe_load(whole)


def test_locks_of_a_dead_dvc_keep_nobody_from_running(finished: Project) -> None:
    path = finished.root / ".dvc" / "tmp" / "rwlock"
    path.write_text('{"/some/where": {"write": {"pid')  # torn
    clear_dead_locks(finished.root)
    finished.set(join={"value": 4})
    finished.dvc("repro", "-s", "join")
    assert finished.value("join") == 16
    path.unlink(missing_ok=True)
    clear_dead_locks(finished.root)  # nothing there: no error


# --- strays ----------------------------------------------------------------------------------


def test_only_outputs_of_teachers_that_are_not_asked_for_are_removed(finished: Project) -> None:
    mine = finished.root / "artifacts" / "my notes"
    mine.mkdir()
    before = {path for path in finished.root.glob("artifacts/**/*")}
    nodes = read_nodes(finished.root, finished.params(teachers=["mamba-130m"]))
    assert remove_strays(finished.root, nodes) == ["artifacts/leaf/smollm2-135m"]
    gone = before - {path for path in finished.root.glob("artifacts/**/*")}
    assert {path.relative_to(finished.root).parts[:3] for path in gone} == {
        ("artifacts", "leaf", "smollm2-135m")
    }
    assert remove_strays(finished.root, nodes) == []


def test_a_removed_stray_comes_back_without_running(finished: Project) -> None:
    count = len(finished.marks())
    nodes = read_nodes(finished.root, finished.params(teachers=["mamba-130m"]))
    remove_strays(finished.root, nodes)
    assert restorable(finished)["leaf@smollm2-135m"] is True
    finished.dvc("repro")
    assert len(finished.marks()) == count and reasons(finished) == {}


def test_files_beside_the_outputs_of_teachers_break_nothing(finished: Project) -> None:
    (finished.root / "artifacts" / "leaf" / ".gitignore").write_text("/mamba-130m\n")
    (finished.root / "artifacts" / "leaf" / "link").symlink_to(finished.root / "stages")
    remove_strays(finished.root, read_nodes(finished.root))
    assert (finished.root / "stages" / "toy.py").is_file()
    assert reasons(finished).keys() <= {"join"}


def test_metrics_of_a_removed_teacher_do_not_stay_behind(finished: Project) -> None:
    nodes = read_nodes(finished.root, finished.params(teachers=["mamba-130m"]))
    remove_strays(finished.root, nodes)
    assert not (finished.root / "metrics" / "leaf" / "smollm2-135m.json").exists()
