"""Parameters of skill stages that others contradict are refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.__main__ import BAD_INPUT, DONE, check_all_params
from tests.stages.skill_dag import capability
from tests.tiny import REPOSITORY


def checked(folder: Path, capsys, **changes: dict[str, Any]) -> tuple[int, str]:
    """Exit code and message of a check of the tiny preset with changes to its sections."""
    params = yaml.safe_load((REPOSITORY / "presets/tiny.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return check_all_params(folder / "params.yaml"), capsys.readouterr().err


def test_sections_that_agree_pass(tmp_path: Path, capsys) -> None:
    assert checked(tmp_path, capsys) == (DONE, "")


@pytest.mark.parametrize("stage", ["toolformer", "grpo", "benchmark"])
def test_a_capability_that_sft_does_not_teach_is_refused(
    tmp_path: Path, capsys, stage: str
) -> None:
    code, said = checked(tmp_path, capsys, **{stage: {"capability": "magic"}})
    assert code == BAD_INPUT
    assert f"{stage}.capability is 'magic', which sft does not teach" in said
    assert "sft.capabilities (tools)" in said


def test_grpo_goes_on_from_the_adapter_that_toolformer_makes(tmp_path: Path, capsys) -> None:
    both = [capability("tools", "arithmetic-tools"), capability("devops", "devops")]
    sections = {"sft": {"capabilities": both}, "toolformer": {"capability": "devops"}}
    assert checked(tmp_path, capsys, sft={"capabilities": both})[0] == DONE
    code, said = checked(tmp_path, capsys, **sections)
    assert code == BAD_INPUT
    assert "grpo.capability is 'tools' and toolformer.capability 'devops'" in said


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("sft", {"capabilities": [capability("tools", "arithmetic-tools", "gsm8k-tools")]}),
        ("toolformer", {"conversations": ["gsm8k-tools"]}),
        ("benchmark", {"conversations": ["gsm8k-tools"]}),
        ("toolformer", {"texts": ["gsm8k-tools"]}),
        ("grpo", {"conversations": ["arithmetic-tools", "gsm8k-tools"]}),
    ],
)
def test_conversations_that_prepare_does_not_make_are_refused(
    tmp_path: Path, capsys, stage: str, values: dict[str, Any]
) -> None:
    code, said = checked(tmp_path, capsys, **{stage: values})
    assert code == BAD_INPUT
    assert f"{stage} reads 'gsm8k-tools', which prepare does not make" in said
    assert "prepare.conversations (now arithmetic-tools, " in said


def test_a_skill_that_the_registry_does_not_know_is_refused(tmp_path: Path, capsys) -> None:
    skills = [capability("tools", "arithmetic-tools"), capability("dev-ops", "devops")]
    code, said = checked(tmp_path, capsys, sft={"capabilities": skills})
    assert code == BAD_INPUT
    assert "unknown capability 'dev-ops'" in said and "devops" in said


@pytest.mark.parametrize("stage", ["toolformer", "grpo"])
def test_more_probes_than_half_of_what_is_held_out_are_refused(
    tmp_path: Path, capsys, stage: str
) -> None:
    held_out = {"heldout_conversations": 16}
    fits = {stage: {"probe_problems": 8}, "prepare": held_out}
    assert checked(tmp_path, capsys, **fits)[0] == DONE
    too_many = {stage: {"probe_problems": 9}, "prepare": held_out}
    code, said = checked(tmp_path, capsys, **too_many)
    assert code == BAD_INPUT
    assert f"{stage}.probe_problems is 9" in said and "half may decide, which is 8" in said


@pytest.mark.parametrize("stage", ["sft", "toolformer", "grpo"])
def test_a_general_text_that_prepare_does_not_read_is_refused(
    tmp_path: Path, capsys, stage: str
) -> None:
    code, said = checked(tmp_path, capsys, **{stage: {"general_text": "poems"}})
    assert code == BAD_INPUT
    assert f"{stage}.general_text is 'poems'" in said and "python-docs, arithmetic" in said
