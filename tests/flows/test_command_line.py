"""The command line: exit codes, what it says, and what it leaves alone."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from flows.__main__ import build_parser
from flows.expectations import LEDGER
from flows.lock import LOCK_HELD, PipelineLock
from flows.plan import keep_lockfile, read_nodes
from flows.run import Request, dry_run, put_params_in_force
from flows.settings import Changes, changed_params
from tests.flows.project import NODES, REPOSITORY, Project, snapshot, wait_for

OK, FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def untouched(before: dict, project: Project) -> bool:
    """Whether nothing changed but the lock and the notes that DVC takes of its own."""
    apart = re.compile(r"\.pipeline\.lock|\.dvc/tmp.*|\.dvc/\.gitignore|scratch|scratch/logs")
    after = snapshot(project.root)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    return not {name for name in changed if not apart.fullmatch(name)}


# --- help ------------------------------------------------------------------------------------


def test_help_needs_no_installed_package_and_mentions_everything() -> None:
    command = [sys.executable, "-S", "-E", "-m", "flows", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == OK, done.stderr
    for action in build_parser()._actions:
        assert all(option in done.stdout for option in action.option_strings)
    for stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]:
        assert stage in done.stdout


def test_the_shell_script_helps_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "run_pipeline.sh", "--stage", "distill", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == OK and "--takeover" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- wrong requests --------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stage", "jion"], "seed, leaf, join"),
        (["--from", "jion"], "seed, leaf, join"),
        (["--preset", "smal"], "small"),
        (["--set", "seed.valeu=3"], "seed.value"),
        (["--set", "seed.steps=0"], "'steps' is 0"),
        (["--set", "seed.steps=many"], "expected int"),
        (["--set", "seed.steps=["], "not valid YAML"),
        (["--models", "gpt-99"], "smollm2-135m"),
        (["--preset", "large", "--stage", "jion"], "seed, leaf, join"),
        (["--preset", "large", "--set", "seed.steps=0"], "'steps' is 0"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_right_and_changes_nothing(
    fresh: Project, arguments: list[str], named: str, dry: list[str]
) -> None:
    before = snapshot(fresh.root)
    done = fresh.flows(*arguments, *dry)
    assert done.returncode == BAD_REQUEST, done.stdout + done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr
    assert untouched(before, fresh), "a refused request must leave everything as it was"


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["--stage", "seed", "--from", "join"], ["--sample-size", "few"]]
)
def test_a_wrong_option_is_refused(fresh: Project, arguments: list[str]) -> None:
    done = fresh.flows(*arguments)
    assert done.returncode == BAD_REQUEST and "usage" in done.stderr


@pytest.mark.parametrize(
    "assignment",
    [
        "pipeline.parallel_stages=0",
        "pipeline.parallel_stages=two",
        "pipeline.retries=-1",
        "pipeline.retry_after_s=soon",
        "pipeline.checkpoint_every_s=-1",
        "teachers=[]",
        "teachers=smollm2-135m",
        "teachers=[nobody]",
    ],
)
def test_a_wrong_value_outside_the_stages_sections_is_refused_too(
    fresh: Project, assignment: str
) -> None:
    changes = Changes(assignments=(assignment,))
    with pytest.raises(ValueError, match=re.split("[.=]", assignment)[-2]):
        dry_run(fresh.root, Request(changes=changes), quiet())


# --- dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--preset", "large"], ["--models", "mamba-130m"]])
def test_a_dry_run_touches_nothing_and_loads_nothing_heavy(
    finished: Project, arguments: list[str]
) -> None:
    for module in ("torch", "mlflow", "prefect", "transformers"):
        (finished.root / f"{module}.py").write_text(f"raise SystemExit('{module} was imported')")
    before = snapshot(finished.root)
    done = finished.flows("--dry-run", *arguments)
    assert done.returncode == OK, done.stderr
    assert "seed" in done.stdout and "join" in done.stdout
    assert ("smollm2-135m" in done.stdout) == (arguments != ["--models", "mamba-130m"])
    assert snapshot(finished.root) == before


def test_a_dry_run_survives_a_ledger_that_a_kill_cut_short(finished: Project) -> None:
    (finished.root / "scratch").mkdir(exist_ok=True)
    (finished.root / LEDGER).write_text('{"small/seed": {"seco')
    dry_run(finished.root, Request(), quiet())


# --- the lock --------------------------------------------------------------------------------


def test_a_held_lock_gives_75_and_names_the_holder(finished: Project) -> None:
    with PipelineLock(finished.root / ".pipeline.lock", "the holder's command"):
        done = finished.flows("--stage", "seed")
        looks = [finished.flows(option) for option in ("--dry-run", "--status")]
    assert done.returncode == LOCK_HELD
    assert f"pid {os.getpid()}" in done.stderr and "the holder's command" in done.stderr
    assert [look.returncode for look in looks] == [OK, OK], "looking needs no lock"
    assert "the holder's command" in looks[1].stdout


# --- params.yaml -----------------------------------------------------------------------------


def test_edits_by_hand_are_kept_when_a_preset_replaces_them(fresh: Project) -> None:
    fresh.set(seed={"value": 77})
    mine = (fresh.root / "params.yaml").read_text()
    console = quiet()
    put_params_in_force(
        fresh.root, changed_params(fresh.root, Changes(preset="large")), "large", console
    )
    large = (fresh.root / "presets" / "large.yaml").read_text()
    assert (fresh.root / "params.yaml").read_text() == large
    (kept,) = (fresh.root / "scratch").glob("params.*.yaml")
    assert kept.read_text() == mine and kept.name in console.file.getvalue()
    assert "seed.value=1" in console.file.getvalue()
    put_params_in_force(
        fresh.root, changed_params(fresh.root, Changes(preset="small")), "small", console
    )
    assert len(list((fresh.root / "scratch").glob("params.*"))) == 1, "a preset is no edit"


# --- reset -----------------------------------------------------------------------------------


@pytest.fixture
def with_history(finished: Project) -> Project:
    """A finished project with unfinished work, and something in mlruns."""
    for path in ("mlruns/mlflow.db", "scratch/seed/0123456789abcdef/metrics.jsonl"):
        (finished.root / path).parent.mkdir(parents=True, exist_ok=True)
        (finished.root / path).write_text("")
    keep_lockfile(finished.root)
    return finished


@pytest.mark.parametrize("answer", ["n\n", "\n", "what?\n", ""])
def test_a_reset_asks_and_without_a_yes_deletes_nothing(with_history: Project, answer: str) -> None:
    before = snapshot(with_history.root)
    done = with_history.flows("--reset", stdin=answer)
    assert done.returncode != OK and "Traceback" not in done.stderr
    assert "artifacts/seed" in done.stdout and "[y/N]" in done.stdout
    assert untouched(before, with_history)


@pytest.mark.parametrize(("arguments", "answer"), [(["--yes"], ""), ([], "y\n")])
def test_after_a_reset_all_stages_run_again_and_history_is_still_there(
    with_history: Project, arguments: list[str], answer: str
) -> None:
    done = with_history.flows("--reset", *arguments, stdin=answer)
    assert done.returncode == OK, done.stderr
    assert (with_history.root / "mlruns" / "mlflow.db").exists()
    assert not (with_history.root / "scratch" / "seed").exists()
    nodes = read_nodes(with_history.root)
    assert [(node.reasons, node.restorable) for node in nodes] == [(("never ran",), False)] * 4
    count = len(with_history.marks())
    with_history.dvc("repro")
    assert len(with_history.marks()) == 2 * count, "restored instead of run"


def test_a_reset_of_one_stage_leaves_the_others(with_history: Project) -> None:
    done = with_history.flows("--reset", "leaf@mamba-130m", "--yes")
    assert done.returncode == OK, done.stderr
    stale = {node.name: node for node in read_nodes(with_history.root) if node.is_stale}
    assert stale["leaf@mamba-130m"].reasons == ("never ran",)
    assert not stale["leaf@mamba-130m"].restorable and set(stale) <= {"leaf@mamba-130m", "join"}
    assert (with_history.root / "artifacts" / "leaf" / "smollm2-135m").exists()


def test_a_reset_where_nothing_is_says_so(fresh: Project) -> None:
    done = fresh.flows("--reset")
    assert done.returncode == OK and "nothing to delete" in done.stdout


def test_a_reset_of_an_unknown_stage_names_those_there_are(with_history: Project) -> None:
    done = with_history.flows("--reset", "jion", "--yes")
    assert done.returncode == BAD_REQUEST and "seed, leaf, join" in done.stderr


def test_a_reset_helps_when_dvc_lock_is_torn(with_history: Project) -> None:
    path = with_history.root / "dvc.lock"
    path.write_bytes(path.read_bytes()[:900])
    done = with_history.flows("--reset", "--yes")
    assert done.returncode == OK, done.stderr
    assert {node.reasons for node in read_nodes(with_history.root)} == {("never ran",)}


# --- whole runs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_first_run_runs_all_and_a_second_one_starts_nothing(
    fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fresh.flows()
    assert done.returncode == OK, done.stderr
    assert len(fresh.marks()) == 8 and "value 12" in done.stdout
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody is there
    again = fresh.flows()
    assert again.returncode == OK, again.stderr
    assert "nothing ran" in again.stdout and len(fresh.marks()) == 8
    assert "did not record" not in done.stdout + again.stdout
    monkeypatch.delenv("PREFECT_API_URL")
    changed = fresh.flows("--set", "join.value=4")
    assert changed.returncode == OK, changed.stderr
    assert fresh.marks()[8:] == ["start join", "end join"] and fresh.value("join") == 16


@pytest.mark.slow
def test_a_failed_stage_gives_1_and_its_reason_in_one_line(finished: Project) -> None:
    finished.set(seed={"value": 5})
    finished.trouble("seed", "ValueError")
    done = finished.flows()
    assert done.returncode == FAILED
    assert done.stderr.strip() == "seed: as was asked"
    assert "Traceback" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_130_and_the_next_run_goes_on(finished: Project, number: int) -> None:
    finished.set(seed={"steps": 400})
    finished.hold()
    process = finished.start("-m", "flows")
    wait_for(lambda: finished.marks()[-1] == "start seed", "the stage")
    wait_for(lambda: len(finished.curve("seed").read_text().splitlines()) == 2, "steps")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, errors
    assert "stopped at step" in errors and "Traceback" not in errors
    finished.let_go()
    done = finished.flows("--stage", "seed")
    assert done.returncode == OK, done.stderr
    assert "ended without a word" not in done.stdout, "it had let the lock go in good order"
    assert "going on from step" in (finished.root / "scratch/logs/seed.log").read_text()
    assert [node.name for node in read_nodes(finished.root)] == list(NODES)
