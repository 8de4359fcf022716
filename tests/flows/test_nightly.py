"""The nightly flow: the verdict on a night's student, and the deployment file that schedules it."""

import ast
from pathlib import Path

import pytest
import yaml

from flows.champion import compare

ROOT = Path(__file__).resolve().parents[2]
METRIC = "student.python-docs.perplexity"


def night(value: float, low: float) -> dict[str, float]:
    return {METRIC: value, f"{METRIC}_low": low, f"{METRIC}_high": 2 * value - low}


def test_the_first_student_is_the_champion() -> None:
    verdict = compare(METRIC, night(9.0, 8.5), champion=None)
    assert verdict.kind == "promoted" and "first" in verdict.sentence


def test_a_lower_value_is_promoted_and_the_sentence_has_both_values() -> None:
    verdict = compare(METRIC, night(8.0, 7.5), champion=8.1)
    assert verdict.kind == "promoted"
    assert "8.0000" in verdict.sentence and "8.1000" in verdict.sentence


@pytest.mark.parametrize("champion", [9.0, 8.7, 8.5])
def test_a_champion_inside_the_interval_is_kept(champion: float) -> None:
    assert compare(METRIC, night(9.0, 8.5), champion).kind == "kept"


def test_a_champion_below_the_whole_interval_is_a_regression() -> None:
    verdict = compare(METRIC, night(9.0, 8.5), champion=8.4999)
    assert verdict.kind == "regression"
    assert "8.4999" in verdict.sentence and "8.5000" in verdict.sentence


def test_the_deployment_file_names_a_flow_that_exists_and_the_version_that_is_installed() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"prefect=={deployments['prefect-version']}" in pins
    (deployment,) = deployments["deployments"]
    module, _, function = deployment["entrypoint"].rpartition(".")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (flow,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    assert any("flow" in ast.unparse(decorator) for decorator in flow.decorator_list)
