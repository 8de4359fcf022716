"""MLflow gets everything, whatever happened on the way: a real store, real stages."""

import sqlite3
import threading
import uuid
from collections.abc import Iterator

import pytest
import yaml
from mlflow.entities import Run

import flows.tracking
from flows.plan import Node, read_nodes
from flows.settings import flat
from flows.stage_process import Outcome, StageFailed, StageRunner, StageStopped
from flows.tracking import EXPERIMENT, StoreOccupied, Tracker, open_store
from tests.flows.nodes import node
from tests.flows.project import NODES, Project, copy_project, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(finished_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished project with a store; making the store takes seconds, so the tests share it."""
    project = copy_project(finished_once, tmp_path_factory.mktemp("store"))
    open_store(project.root)
    return project


@pytest.fixture
def project(store: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The same, as the working folder, and curves are sent often."""
    monkeypatch.chdir(store.root)
    monkeypatch.setattr(flows.tracking, "POLL_S", 0.05)
    yield store
    for switch in ("hold", "odd"):
        (store.root / switch).unlink(missing_ok=True)


def begin(project: Project) -> tuple[Tracker, StageRunner]:
    """Begin to record a run of the pipeline."""
    runner = StageRunner(project.root, uuid.uuid4().hex, verbose=False)
    params = flat(yaml.safe_load((project.root / "params.yaml").read_text()))
    return Tracker(project.root, params, {"run": "a test"}, runner.metrics_path), runner


def carry_out(tracker: Tracker, runner: StageRunner, node: Node) -> Outcome:
    """Run a node for real and record it, as flows.run does."""
    tracker.stage_started(node, {"value": 1})
    log = runner.log_path(node)
    try:
        outcome = runner.run(node)
    except (StageFailed, StageStopped) as error:
        tracker.stage_failed(node, str(error), isinstance(error, StageStopped), log)
        raise
    tags = {"output": f"digest of {node.name}", "fingerprint": outcome.fingerprint or ""}
    tracker.stage_finished(outcome, tags, log)
    return outcome


def run_once(project: Project, name: str) -> tuple[Run, Run]:
    """Run one node for real in a pipeline run; give the parent's and the stage's MLflow run."""
    tracker, runner = begin(project)
    carry_out(tracker, runner, node(project, name))
    tracker.close("FINISHED", {})
    assert tracker.problem is None
    return parent_and_children(project, tracker)[0], child(project, tracker, name)


def parent_and_children(project: Project, tracker: Tracker) -> tuple[Run, list[Run]]:
    client = open_store(project.root)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    clause = f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    return client.get_run(tracker.run_id), list(client.search_runs([experiment], clause))


def child(project: Project, tracker: Tracker, name: str) -> Run:
    (found,) = (
        run for run in parent_and_children(project, tracker)[1] if run.data.tags["stage"] == name
    )
    return found


def curve(project: Project, run: Run) -> list[tuple[int, float]]:
    """The points (step, value) that MLflow has of a stage's `done`, as they came."""
    history = open_store(project.root).get_metric_history(run.info.run_id, "main.done")
    return sorted((point.step, point.value) for point in history)


def points(steps: int, value: int) -> list[tuple[int, float]]:
    """The whole curve of a toy, each point once."""
    return [(step, float(step * value)) for step in range(1, steps + 1)]


def shown(project: Project, run: Run) -> set[str]:
    return {entry.path for entry in open_store(project.root).list_artifacts(run.info.run_id)}


# --- what is recorded ------------------------------------------------------------------------


def test_a_run_has_a_parent_with_all_params_and_a_nested_run_with_everything(
    project: Project,
) -> None:
    project.set(seed={"value": 10, "steps": 6})
    parent, seed = run_once(project, "seed")
    assert parent.info.status == seed.info.status == "FINISHED"
    assert parent.data.params["seed.value"] == "10"
    assert parent.data.params["pipeline.expected.seed.seconds"] == "10"
    assert parent.data.metrics["seed.value"] == 10
    assert seed.data.params == {"value": "1"}
    assert seed.data.tags["state"] == "ran" and seed.data.tags["fingerprint"]
    assert seed.data.metrics["final.value"] == 10
    assert seed.data.metrics["measured.speed"] == 12.5
    assert seed.data.metrics["measured.wall_s"] >= 0
    assert curve(project, seed) == points(steps=6, value=10)
    assert shown(project, seed) == {"picture.svg", "manifest.json", "seed.log"}


def test_a_node_of_a_teacher_is_recorded_like_any_other(project: Project) -> None:
    project.set(leaf={"value": 20})
    parent, leaf = run_once(project, "leaf@mamba-130m")
    assert leaf.info.status == "FINISHED" and leaf.data.tags["state"] == "ran"
    assert leaf.info.run_name == "leaf@mamba-130m"
    value = project.value("leaf@mamba-130m")
    assert leaf.data.metrics["final.value"] == value
    assert value in [parent.data.metrics[key] for key in parent.data.metrics if "mamba" in key]


def test_a_metric_with_a_character_that_mlflow_refuses_is_not_lost(project: Project) -> None:
    project.set(seed={"value": 30})
    (project.root / "odd").touch()
    _, seed = run_once(project, "seed")
    assert [v for key, v in seed.data.metrics.items() if "humaneval.pass" in key] == [0.25]


def test_what_is_reused_appears_with_its_metrics_and_the_run_that_made_it(
    project: Project,
) -> None:
    project.set(seed={"value": 40})
    _, made = run_once(project, "seed")
    tracker, runner = begin(project)
    outcome = Outcome(node(project, "seed"), "reused")
    tags = {"output": made.data.tags["output"]}
    tracker.stage_finished(outcome, tags, runner.log_path(outcome.node))
    tracker.close("FINISHED", {})
    assert tracker.problem is None
    seed = child(project, tracker, "seed")
    assert seed.data.tags["state"] == "reused" and seed.info.status == "FINISHED"
    assert seed.data.tags["made_by_run"] == made.info.run_id
    assert seed.data.metrics["final.value"] == 40
    assert parent_and_children(project, tracker)[0].data.metrics["seed.value"] == 40


def test_the_whole_diamond_can_be_compared_in_one_parent(project: Project) -> None:
    tracker, runner = begin(project)
    for found in read_nodes(project.root):
        outcome = Outcome(found, "reused")
        tracker.stage_finished(outcome, {"output": "x"}, runner.log_path(found))
    tracker.close("FINISHED", {})
    parent, children = parent_and_children(project, tracker)
    assert sorted(run.data.tags["stage"] for run in children) == sorted(NODES)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len([key for key in parent.data.metrics if key.endswith("value")]) == len(NODES)
    assert tracker.problem is None


# --- curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 12])
def test_the_curve_of_the_run_before_is_not_taken_for_this_ones(
    project: Project, steps: int
) -> None:
    project.set(seed={"value": 50 + steps, "steps": 7})
    run_once(project, "seed")
    project.set(seed={"value": 60 + steps, "steps": steps})
    _, seed = run_once(project, "seed")
    assert curve(project, seed) == points(steps, value=60 + steps)


def test_a_resumed_stage_has_its_whole_curve_and_the_stopped_run_what_it_did(
    project: Project,
) -> None:
    project.set(seed={"value": 70, "steps": 200})
    project.hold()
    tracker, runner = begin(project)
    begun = threading.Thread(
        target=lambda: (_wait_for_steps(project), runner.stop()), name="impatient"
    )
    begun.start()
    with pytest.raises(StageStopped):
        carry_out(tracker, runner, node(project, "seed"))
    begun.join()
    tracker.close("KILLED", {})
    stopped = child(project, tracker, "seed")
    done = curve(project, stopped)
    assert stopped.info.status == "KILLED" and "stopped at step" in stopped.data.tags["reason"]
    assert 0 < len(done) < 200 and done == points(len(done), value=70)
    project.let_go()
    _, resumed = run_once(project, "seed")
    assert curve(project, resumed) == points(200, value=70)


def _wait_for_steps(project: Project) -> None:
    def begun() -> bool:
        path = project.curve("seed")
        return path.parent.name != "last" and len(path.read_text().splitlines()) > 2

    wait_for(begun, "steps")


# --- what goes wrong -------------------------------------------------------------------------


def test_a_failed_stage_is_recorded_with_its_reason_and_log(project: Project) -> None:
    project.set(seed={"value": 80})
    project.trouble("seed", "ValueError")
    tracker, runner = begin(project)
    with pytest.raises(StageFailed):
        carry_out(tracker, runner, node(project, "seed"))
    tracker.close("FAILED", {})
    seed = child(project, tracker, "seed")
    assert seed.info.status == "FAILED" and "as was asked" in seed.data.tags["reason"]
    assert "seed.log" in shown(project, seed)
    assert parent_and_children(project, tracker)[0].info.status == "FAILED"


def test_runs_that_a_kill_left_running_are_ended_at_the_next_start(project: Project) -> None:
    client = open_store(project.root)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    dead = client.create_run(experiment, run_name="killed").info.run_id
    begin(project)[0].close("FINISHED", {})
    assert client.get_run(dead).info.status == "KILLED"
    assert not client.search_runs([experiment], "attributes.status = 'RUNNING'")


def test_an_occupied_store_is_refused_in_words(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.tracking, "PATIENCE_S", 0.2)
    connection = sqlite3.connect(project.root / "mlruns" / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StoreOccupied, match="mlruns/mlflow.db cannot be written.*close it"):
            open_store(project.root)
    finally:
        connection.close()
    open_store(project.root)


def test_a_store_that_is_occupied_for_a_moment_loses_nothing(project: Project) -> None:
    project.set(seed={"value": 90, "steps": 5})
    tracker, runner = begin(project)
    database = project.root / "mlruns" / "mlflow.db"
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    threading.Timer(3.0, connection.close).start()  # longer than it takes to run the stage
    carry_out(tracker, runner, node(project, "seed"))
    tracker.close("FINISHED", {})
    assert tracker.problem is None
    assert curve(project, child(project, tracker, "seed")) == points(5, value=90)


@pytest.mark.parametrize("metrics", ['{"value": "many"}', "<<<<<<< HEAD"])
def test_metrics_that_are_no_numbers_end_no_recording_in_silence(
    project: Project, metrics: str
) -> None:
    path = project.root / "metrics" / "seed.json"
    kept = path.read_text()
    path.write_text(metrics)
    try:
        tracker, runner = begin(project)
        for name in ("seed", "join"):
            outcome = Outcome(node(project, name), "reused")
            tracker.stage_finished(outcome, {"output": "x"}, runner.log_path(outcome.node))
        tracker.close("FINISHED", {})
    finally:
        path.write_text(kept)
    assert parent_and_children(project, tracker)[0].info.status == "FINISHED"
    assert tracker.problem is not None
    assert child(project, tracker, "join").data.metrics["final.value"] == project.value("join")
