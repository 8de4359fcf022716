"""MLflow remembers what came out: one parent run a pipeline run, one nested run a stage.

The only module that imports mlflow. Stages write files; a thread here sends them on, so that a
slow or locked store delays nobody. A resumed stage's run gets its whole curve, from line one. A
reused stage appears in the new parent too, with its metrics and a link to the run that made them,
so that two pipeline runs can be compared whole.
"""

import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from flows.plan import Node, read_metrics
from flows.stage_process import Outcome

EXPERIMENT = "nanofoundry"
MODEL = "nanofoundry-student"
NOTES = (
    "Each parent run is one run of the pipeline; its metrics are STAGE.METRIC of every stage, run "
    "or reused. Select two parents and press Compare. A stage's curve, picture and report are in "
    "its nested run."
)
BATCH = 500  # metrics a call; MLflow takes at most 1,000
LARGEST_ARTIFACT = 32 * 2**20  # bytes; bigger outputs stay in artifacts/, named by checksum
POLL_S = 2.0
PATIENCE_S = 5.0  # for a store that another program holds


class StoreOccupied(RuntimeError):
    """The MLflow store cannot be written."""


def open_store(root: Path) -> MlflowClient:
    """Open mlruns/mlflow.db, made on first use; raises StoreOccupied when it cannot be written.

    Only to be called under the pipeline's lock: two processes that create the file at once ruin it.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    database = root / "mlruns" / "mlflow.db"
    database.parent.mkdir(exist_ok=True)
    _check_writable(database)
    client = MlflowClient(f"sqlite:///{database.resolve()}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        place = (database.parent / "artifacts").resolve().as_uri()
        number = client.create_experiment(EXPERIMENT, artifact_location=place)
        client.set_experiment_tag(number, "mlflow.note.content", NOTES)
    return client


def _check_writable(database: Path) -> None:
    connection = sqlite3.connect(database, timeout=PATIENCE_S)
    try:
        connection.execute("BEGIN IMMEDIATE").connection.rollback()
    except sqlite3.DatabaseError as error:
        raise StoreOccupied(
            f"the MLflow store mlruns/mlflow.db cannot be written ({error}); another program may "
            "be writing to it: close it and run this again. Nothing was started and nothing is lost"
        ) from error
    finally:
        connection.close()


@dataclass(frozen=True)
class Champion:
    """The best student so far, as the model registry's alias `champion` names it."""

    version: str
    run_id: str
    value: float  # of the metric that it was promoted by


def read_champion(root: Path, metric: str) -> Champion | None:
    """The present champion, judged by `metric`; None before the first promotion."""
    client = open_store(root)
    try:
        version = client.get_model_version_by_alias(MODEL, "champion")
    except MlflowException:  # no such model, or no such alias: nobody was promoted yet
        return None
    value = version.tags.get(metric)
    return Champion(str(version.version), version.run_id, float(value)) if value else None


def promote(root: Path, run_id: str, folder: Path, values: dict[str, float]) -> str:
    """Register the student in `folder` and make it champion; gives its version."""
    client = open_store(root)
    with contextlib.suppress(MlflowException):  # there already
        client.create_registered_model(MODEL)
    tags = {key: str(value) for key, value in values.items()}
    source = folder.resolve().as_uri()
    version = str(client.create_model_version(MODEL, source, run_id=run_id, tags=tags).version)
    client.set_registered_model_alias(MODEL, "champion", version)
    return version


class Tracker:
    """Records one pipeline run; all calls return at once, a thread does the work.

    `problem` is, at the end, what could not be recorded, or None.
    """

    def __init__(
        self, root: Path, params: dict[str, Any], tags: dict[str, str],
        metrics_path: Callable[[Node], Path | None],
    ) -> None:  # fmt: skip
        self.root = root
        self.client = open_store(root)
        self.experiment = self.client.get_experiment_by_name(EXPERIMENT).experiment_id
        self.problem: str | None = None
        self._metrics_path = metrics_path
        self._runs: dict[str, str] = {}
        self._sent: dict[str, int] = {}
        self._nodes: dict[str, Node] = {}
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._end_dead_runs()
        self.run_id = self._create_run(tags["run"], tags)
        self._log_params(self.run_id, params)
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.client.tracking_uri)
        self._monitor.start()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stage_started(self, node: Node, params: dict[str, Any]) -> None:
        """A node begins to run: open its run and follow its curve."""
        self._queue.put(lambda: self._start_stage(node, params, {"state": "running"}))

    def stage_finished(self, outcome: Outcome, tags: dict[str, str], log: Path) -> None:
        """A node has its output, made now or reused."""
        self._queue.put(lambda: self._finish_stage(outcome, tags, log))

    def stage_failed(self, node: Node, reason: str, stopped: bool, log: Path) -> None:
        """A node failed or was stopped."""
        status = RunStatus.KILLED if stopped else RunStatus.FAILED
        self._queue.put(lambda: self._fail_stage(node, reason, status, log))

    def close(self, status: str, tags: dict[str, str]) -> None:
        """Write what is left; status is "FINISHED", "FAILED" or "KILLED"."""
        self._monitor.finish()
        self._queue.put(lambda: self._end_run(self.run_id, RunStatus.from_string(status), tags))
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                job = self._send_curves
            if job is None:
                return
            try:
                job()
            except (MlflowException, SQLAlchemyError, OSError, ValueError, LookupError) as error:
                first_line = next(iter(str(error).splitlines()), type(error).__name__)
                self.problem = f"MLflow did not record everything: {first_line}"

    def _start_stage(self, node: Node, params: dict[str, Any], tags: dict[str, str]) -> None:
        tags = {"stage": node.name, "mlflow.parentRunId": self.run_id, **tags}
        self._runs[node.name] = self._create_run(node.name, tags)
        self._nodes[node.name] = node
        self._sent[node.name] = 0
        self._log_params(self._runs[node.name], params)

    def _finish_stage(self, outcome: Outcome, tags: dict[str, str], log: Path) -> None:
        node = outcome.node
        if outcome.state == "ran":
            self._send_curve(node, ended=True)
        else:
            if node.name not in self._runs:
                self._start_stage(node, {}, {})
            tags = {**tags, **self._origin_of(node, tags)}
        run = self._runs[node.name]
        metrics = read_metrics(self.root, node)
        self._log_values(run, {f"final.{key}": value for key, value in metrics.items()})
        self._log_values(
            self.run_id, {f"{node.name}.{key}": value for key, value in metrics.items()}
        )
        if outcome.state == "ran":
            self._send_result(node, run, log)
        self.client.set_tag(self.run_id, f"stage.{_plain(node.name)}", outcome.state)
        self._end_run(run, RunStatus.FINISHED, {**tags, "state": outcome.state})
        self._forget(node)

    def _fail_stage(self, node: Node, reason: str, status: RunStatus, log: Path) -> None:
        if node.name not in self._runs:
            self._start_stage(node, {}, {})
        self._send_curve(node)
        self._log_file(self._runs[node.name], log)
        self._end_run(self._runs[node.name], status, {"state": "failed", "reason": reason[:5000]})
        self._forget(node)

    def _forget(self, node: Node) -> None:
        for kept in (self._nodes, self._sent, self._runs):
            kept.pop(node.name, None)

    def _send_result(self, node: Node, run: str, log: Path) -> None:
        """What differs from run to run, pictures and reports, and the log."""
        path = self.root / "scratch" / node.name / "last" / "result.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        self._log_values(run, {f"measured.{k}": v for k, v in result["measured"].items()})
        for name in result["shown"]:
            self._log_file(run, self.root / node.out / name)
        self._log_file(run, self.root / node.out / "manifest.json")
        self._log_file(run, log)

    def _origin_of(self, node: Node, tags: dict[str, str]) -> dict[str, str]:
        """The run that made what is reused here: same node, same output."""
        clause = f"tags.stage = '{node.name}' and tags.state = 'ran'"
        if "output" in tags:
            clause += f" and tags.output = '{tags['output']}'"
        found = self.client.search_runs(
            [self.experiment], clause, max_results=1, order_by=["attributes.start_time DESC"]
        )
        return {"made_by_run": found[0].info.run_id} if found else {"made_by_run": "unknown"}

    def _send_curves(self) -> None:
        for node in list(self._nodes.values()):
            self._send_curve(node)

    def _send_curve(self, node: Node, ended: bool = False) -> None:
        """Send the lines of metrics.jsonl that are not sent yet."""
        path = self._metrics_path(node)
        if path is None and ended:
            path = self.root / "scratch" / node.name / "last" / "metrics.jsonl"
        if path is None or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        new = [json.loads(line) for line in lines[self._sent[node.name] :] if line.endswith("}")]
        metrics = [metric for line in new for metric in _as_metrics(line)]
        for start in range(0, len(metrics), BATCH):
            part = metrics[start : start + BATCH]
            self.client.log_batch(self._runs[node.name], metrics=part)
        self._sent[node.name] += len(new)

    def _create_run(self, name: str, tags: dict[str, str]) -> str:
        return self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id

    def _log_params(self, run: str, params: dict[str, Any]) -> None:
        entries = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(entries), 100):  # MLflow's limit a call
            self.client.log_batch(run, params=entries[start : start + 100])

    def _log_values(self, run: str, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_plain(key), float(value), now, 0) for key, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run, metrics=metrics[start : start + BATCH])

    def _log_file(self, run: str, path: Path) -> None:
        if path.is_file() and path.stat().st_size <= LARGEST_ARTIFACT:
            self.client.log_artifact(run, str(path))

    def _end_run(self, run: str, status: RunStatus, tags: dict[str, str]) -> None:
        self.client.log_batch(run, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        self.client.set_terminated(run, RunStatus.to_string(status))

    def _end_dead_runs(self) -> None:
        """Runs still RUNNING belong to a killed pipeline: we hold the lock, so nobody else runs."""
        for run in self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'"):
            self.client.set_terminated(run.info.run_id, "KILLED")


def _plain(name: str) -> str:
    """A name in characters that MLflow allows: profile/TEACHER."""
    return name.replace("@", "/")


def _as_metrics(line: dict[str, Any]) -> list[Metric]:
    """The numbers of one line of metrics.jsonl as MLflow metrics, named PHASE.METRIC."""
    structure = {"phase", "step", "total", "time_s"}
    when = int(line["time_s"] * 1000)
    values = {key: value for key, value in line.items() if key not in structure} or {
        "steps_done": line["step"]
    }
    step = line["step"]
    names = {_plain(f"{line['phase']}.{key}"): value for key, value in values.items()}
    return [Metric(name, float(value), when, step) for name, value in names.items()]
