"""The whole DAG as a user runs it: a clone, run_pipeline.sh, and again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = [
    "prepare", "profile/smollm2-135m", "extract/smollm2-135m", "distill", "route", "sft",
    "toolformer", "grpo", "benchmark",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, as they are now, in a repository of their own."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    names = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(
        ["git", *names], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return subprocess.run(
        ["./run_pipeline.sh", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )


def states(project: Path) -> dict[str, str]:
    """Stage -> state, as the newest parent run in MLflow has it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("nanofoundry").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    prefix = "stage."
    tags = parent.data.tags.items()
    return {key.removeprefix(prefix): value for key, value in tags if key.startswith(prefix)}


def test_the_tiny_preset_runs_through_and_then_everything_is_reused(project: Path) -> None:
    first = run(project, "--preset", "tiny")
    assert first.returncode == 0, first.stdout + first.stderr
    assert states(project) == dict.fromkeys(STAGES, "ran")
    metrics = json.loads((project / "metrics" / "benchmark.json").read_text())
    assert 0.5 < metrics["student.python-docs.perplexity_ratio"] < 100
    assert metrics["student.python-docs.kl"] < metrics["before_training.python-docs.kl"] * 1.5
    assert (project / "artifacts" / "benchmark" / "report.html").stat().st_size > 50_000
    assert "make ui" in first.stdout and "report.html" in first.stdout

    second = run(project)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "everything was up to date" in second.stdout
    assert states(project) == dict.fromkeys(STAGES, "reused")


def test_one_knob_reruns_its_stage_and_what_follows_and_going_back_runs_nothing(
    project: Path,
) -> None:
    changed = run(project, "--set", "grpo.probe_problems=3")
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert states(project) == {
        **dict.fromkeys(STAGES, "reused"), "grpo": "ran", "benchmark": "ran"
    }  # fmt: skip
    back = run(project, "--set", "grpo.probe_problems=4")
    assert back.returncode == 0, back.stdout + back.stderr
    assert "ran" not in states(project).values()


def test_the_student_opens_in_stock_transformers_and_talks(project: Path) -> None:
    code = (
        "from transformers import pipeline\n"
        "talk = pipeline('text-generation', 'artifacts/distill/student')\n"
        "print(talk('A list is', max_new_tokens=5)[0]['generated_text'])"
    )
    command = [str(project / ".venv" / "bin" / "python"), "-c", code]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A list is")


@contextlib.contextmanager
def served_nightly(project: Path, log: Path) -> Iterator[None]:
    """The nightly flow, served every few seconds; at the end nothing of it is left."""
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    command = [str(project / ".venv" / "bin" / "python"), "-m", "flows.nightly", "--every-s", "6"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=project, stdout=stream, stderr=subprocess.STDOUT,
            env={**environment, "PREFECT_LOGGING_LEVEL": "INFO"}, start_new_session=True,
        )  # fmt: skip
        tree = psutil.Process(process.pid)
        try:
            yield
        finally:
            children = tree.children(recursive=True)
            process.send_signal(signal.SIGINT)
            psutil.wait_procs([tree, *children], timeout=20)
            for child in [*children, tree]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def wait_for(what: Callable[[], object], log: Path, limit_s: float = 180) -> object:
    """Poll until `what` gives something; the log tells why it never did."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.5)
    pytest.fail(f"{what} did not happen in {limit_s} s:\n{log.read_text()[-3000:]}")


def test_nights_promote_the_first_student_and_report_a_regression(
    project: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    from flows.tracking import MODEL, read_champion

    params = (project / "params.yaml").read_text()
    (metric,) = (line.split()[1] for line in params.splitlines() if "champion_metric:" in line)
    log = tmp_path / "nightly.log"
    with served_nightly(project, log):
        champion = wait_for(lambda: read_champion(project, metric), log)
        metrics = json.loads((project / "metrics" / "benchmark.json").read_text())
        assert (champion.version, champion.value) == ("1", pytest.approx(metrics[metric]))
        # A champion that no student can reach: the following night has to say so.
        client = MlflowClient(f"sqlite:///{project}/mlruns/mlflow.db")
        client.set_model_version_tag(MODEL, champion.version, metric, "0.01")
        wait_for(lambda: "Regression" in log.read_text(), log)
    assert "is worse than the champion's 0.0100" in log.read_text()
    assert read_champion(project, metric).version == "1"
