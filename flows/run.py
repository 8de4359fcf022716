"""One run of the pipeline: plan, run what is stale, record, show. The steps that every door shares.

1. repair what a kill may have left (dvc.lock, DVC's locks)
2. put params.yaml into force, once every section of it has been checked
3. plan: what is stale, and why
4. run it through Prefect, if there is anything to run
5. record everything in MLflow, reused stages too
6. show the table
"""

import hashlib
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.console import Estimate, ProgressView, duration, plan_table, result_table
from flows.expectations import expectations, note_usage
from flows.plan import (
    Node,
    clear_dead_locks,
    keep_lockfile,
    read_nodes,
    remove_strays,
    repair_lockfile,
    repair_run_cache,
    select_nodes,
)
from flows.settings import BadSetting, Changes, changed_params, flat, read_options
from flows.stage_process import Outcome, StageRunner
from registry.strict import strict_yaml

VERDICTS = 3  # sentences of the report that are shown: those on the text trained for


@dataclass(frozen=True)
class Request:
    """What is asked for: which stages, under which parameters."""

    only: str | None = None
    start: str | None = None
    changes: Changes = field(default_factory=Changes)
    verbose: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    outcomes: list[Outcome]
    run_id: str
    seconds: float


def dry_run(root: Path, request: Request, console: Console) -> None:
    """Print the plan; writes nothing."""
    text = changed_params(root, request.changes)
    check_params(root, text)
    nodes = read_nodes(root, text)
    chosen = select_nodes(nodes, request.only, request.start)
    console.print(plan_table(nodes, chosen, expectations(root, strict_yaml(text), nodes)))


def run_pipeline(root: Path, request: Request, console: Console) -> Summary:
    """Run what is asked for; the caller holds the pipeline's lock."""
    began = time.monotonic()
    if repaired := repair_lockfile(root):
        console.print(repaired)
    clear_dead_locks(root)
    repair_run_cache(root)
    text = changed_params(root, request.changes)
    check_params(root, text)
    nodes = read_nodes(root, text)
    chosen = select_nodes(nodes, request.only, request.start)  # refuses before anything is written
    put_params_in_force(root, text, request.changes.preset, console)
    for stray in remove_strays(root, nodes):
        console.print(f"removed {stray}: its teacher is not asked for (DVC's cache keeps it)")
    params = strict_yaml(text)
    run = _Run(root, chosen, params, request, console)
    outcomes = run.execute()
    keep_lockfile(root)
    show_results(outcomes, root, console, run.tracker.problem)
    return Summary(outcomes, run.tracker.run_id, time.monotonic() - began)


def check_params(root: Path, text: str) -> None:
    """Have every section checked; raises BadSetting (a ValueError) with what is wrong."""
    read_options(strict_yaml(text))
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / "params.yaml"
        candidate.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "stages", "--check", str(candidate)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadSetting(done.stderr.strip())


def put_params_in_force(root: Path, new: str, preset: str | None, console: Console) -> None:
    """Write params.yaml; a hand-edited one that a preset replaces is kept in scratch."""
    path = root / "params.yaml"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if new == old:
        return
    presets = {file.read_text(encoding="utf-8") for file in (root / "presets").glob("*.yaml")}
    if preset and old and old not in presets:
        (root / "scratch").mkdir(exist_ok=True)
        kept = root / "scratch" / f"params.{time.strftime('%Y%m%d-%H%M%S')}.yaml"
        kept.write_text(old, encoding="utf-8")
        console.print(
            f"params.yaml had changes of yours; they are kept in {kept.relative_to(root)}"
        )
    part = path.with_suffix(".part")
    part.write_text(new, encoding="utf-8")
    part.replace(path)
    before, after = (flat(strict_yaml(text) or {}) for text in (old, new))
    changed = [f"{key}={after.get(key)}" for key in after if before.get(key) != after.get(key)]
    shown = ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
    console.print(f"params.yaml now has {shown}", highlight=False)


class _Run:
    """The state of one run: who runs, who draws, who records."""

    def __init__(
        self,
        root: Path,
        nodes: list[Node],
        params: dict[str, Any],
        request: Request,
        console: Console,
    ) -> None:
        from flows.tracking import Tracker

        self.root, self.nodes, self.params, self.console = root, nodes, params, console
        self.options = read_options(params)
        self.runner = StageRunner(
            root,
            uuid.uuid4().hex,
            request.verbose,
            self.options.checkpoint_every_s,
            self.options.parallel_stages,
        )
        known = expectations(root, params, nodes)
        estimate = Estimate({node.name: known[node.name]["seconds"] for node in nodes})
        self.view = ProgressView(console, nodes, estimate, self.runner.metrics_path)
        self.outcomes: dict[str, Outcome] = {}
        self.tracker = Tracker(root, flat(params), self._tags(request), self.runner.metrics_path)

    def execute(self) -> list[Outcome]:
        """Run all nodes; ends the MLflow run whatever happens."""
        status = "FAILED"
        try:
            with self.view:
                if any(node.is_stale for node in self.nodes):
                    self._run_through_prefect()
                else:
                    for node in self.nodes:
                        self.finished(Outcome(node, "reused"))
            status = "FINISHED"
        finally:
            if self.runner.stopping.is_set():
                status = "KILLED"
            self.tracker.close(status, {})
        return [self.outcomes[node.name] for node in self.nodes]

    def started(self, node: Node) -> None:
        """A node begins."""
        self.view.started(node)
        self.tracker.stage_started(node, flat(self.params.get(node.stage, {})))

    def finished(self, outcome: Outcome) -> None:
        """A node has its output."""
        self.outcomes[outcome.node.name] = outcome
        node = outcome.node
        said = {
            "ran": f"done in {duration(outcome.seconds)}",
            "restored": "reused (from DVC's run cache)",
            "reused": "reused",
        }[outcome.state]
        tags = {"output": output_digest(self.root, node)}
        if outcome.state == "ran":
            tags["fingerprint"] = outcome.fingerprint
            note_usage(self.root, self.params["preset"], node.name, outcome.seconds)
        self.tracker.stage_finished(outcome, tags, self.runner.log_path(node))
        self.view.finished(outcome, said)

    def failed(self, node: Node, error: Exception) -> None:
        """A node failed or was stopped."""
        log = self.runner.log_path(node)
        self.tracker.stage_failed(node, str(error), self.runner.stopping.is_set(), log)
        self.view.estimate.began.pop(node.name, None)

    def _run_through_prefect(self) -> None:
        from flows.pipeline import Work, run_flow

        work = Work(
            nodes=self.nodes,
            runner=self.runner,
            parallel=self.options.parallel_stages,
            retries=self.options.retries,
            retry_after_s=self.options.retry_after_s,
            on_start=self.started,
            on_finish=self.finished,
            on_failure=self.failed,
        )
        run_flow(work, self.root)

    def _tags(self, request: Request) -> dict[str, str]:
        asked = request.only or (f"from {request.start}" if request.start else "all")
        commit = git(self.root, "rev-parse", "HEAD")
        changed = git(self.root, "status", "--porcelain", "--untracked-files=no")
        return {
            "run": f"{self.params['preset']} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            "preset": self.params["preset"],
            "asked_for": asked,
            "git_commit": commit + (" with changes" if changed else ""),
            "mlflow.source.name": "run_pipeline.sh",
            "mlflow.source.git.commit": commit,
        }


def output_digest(root: Path, node: Node) -> str:
    """The checksum of a node's output: of its manifest, which holds all others."""
    return hashlib.sha256((root / node.out / "manifest.json").read_bytes()).hexdigest()[:16]


def git(root: Path, *arguments: str) -> str:
    """The output of a git command; empty outside a repository."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def show_results(
    outcomes: list[Outcome], root: Path, console: Console, problem: str | None
) -> None:
    """The table, student against teacher in words, and where to look further."""
    console.print(result_table(outcomes, root))
    if all(outcome.state == "reused" for outcome in outcomes):
        console.print("everything was up to date; nothing ran", style="bold")
    report = root / "artifacts" / "benchmark" / "test_report.md"
    if report.is_file() and any(outcome.node.stage == "benchmark" for outcome in outcomes):
        lines = report.read_text(encoding="utf-8").splitlines()
        verdicts = [line for line in lines if line.startswith("- ")]
        console.print("\n".join(verdicts[:VERDICTS]), highlight=False)
        console.print("report:  artifacts/benchmark/report.html")
    console.print("compare: make ui   (MLflow, http://127.0.0.1:5000)", highlight=False)
    if problem:
        console.print(f"[yellow]{problem}[/]; results are safe in artifacts/ and metrics/")
