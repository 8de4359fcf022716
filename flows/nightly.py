"""The nightly flow: run the DAG, compare the student with the champion, promote or report.

    python -m flows.nightly                          serve it here, every night at 02:00
    python -m flows.nightly --cron "30 4 * * 1-5"    at other times
    prefect deploy --name nightly                    on a Prefect server with a worker: prefect.yaml

The champion is an MLflow model alias. A night's student replaces it when its metric (params.yaml:
pipeline.champion_metric, lower is better) is lower; when the metric's 95 % interval lies wholly
above the champion's value, the flow run fails and names the regression. A night that finds the
pipeline's lock held is skipped.
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.flows import EntrypointType
from prefect.states import Cancelled, Completed, Failed
from rich.console import Console

from flows.champion import Verdict, compare
from flows.environment import prepare_environment
from flows.lock import Held, PipelineLock
from flows.pipeline import prefect_server
from flows.plan import read_metrics
from flows.run import Request, Summary, run_pipeline

ROOT = Path(__file__).resolve().parent.parent


@flow(name="nightly", validate_parameters=False, persist_result=False)
def nightly() -> Any:
    """Run what is stale and judge the student; the state's name says how it went."""
    prepare_environment(ROOT)
    try:
        with PipelineLock(ROOT / ".pipeline.lock", "nightly flow"):
            summary = run_pipeline(ROOT, Request(), Console(force_terminal=False))
            verdict = judge(ROOT, summary)
    except Held as held:
        return Cancelled(name="Skipped", message=str(held))
    state = Failed if verdict.kind == "regression" else Completed
    return state(name=verdict.kind.capitalize(), message=verdict.sentence)


def judge(root: Path, summary: Summary) -> Verdict:
    """Compare with the champion; promote where that is deserved."""
    from flows.tracking import promote, read_champion

    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    metric = params["pipeline"]["champion_metric"]
    node = next(o.node for o in summary.outcomes if o.node.stage == "benchmark")
    values = read_metrics(root, node)
    if metric not in values:
        raise ValueError(
            f"pipeline.champion_metric is '{metric}', which {node.metrics} does not have; "
            f"it has {', '.join(values)}"
        )
    champion = read_champion(root, metric)
    verdict = compare(metric, values, champion.value if champion else None)
    if verdict.kind == "promoted":
        student = root / "artifacts" / "distill" / "student"
        version = promote(root, summary.run_id, student, {metric: values[metric]})
        verdict = Verdict("promoted", f"{verdict.sentence}; it is version {version}")
    return verdict


def main(arguments: list[str]) -> None:
    """Serve the flow on a schedule until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.nightly", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cron", default="0 2 * * *", help="when (default: every night at 02:00)")
    parser.add_argument("--every-s", type=float, help="instead: every so many seconds")
    options = parser.parse_args(arguments)
    when: dict[str, Any] = {"cron": options.cron}
    if options.every_s:
        when = {"interval": timedelta(seconds=options.every_s)}
    with prefect_server(ROOT, schedules=True):
        nightly.serve("nightly", limit=1, entrypoint_type=EntrypointType.MODULE_PATH, **when)


if __name__ == "__main__":
    prepare_environment(ROOT)
    # By its importable name, so that the runs that are started later find it.
    from flows.nightly import main as importable_main

    importable_main(sys.argv[1:])
