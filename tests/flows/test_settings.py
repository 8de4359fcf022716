"""params.yaml as the command line changes it: right values, comments kept, nothing written."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.settings import BadSetting, Changes, changed_params, flat, preset_names
from registry.catalog import UnknownName, lookup, names, select
from registry.strict import strict_yaml
from tests.flows.project import REPOSITORY, snapshot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the repository's own params.yaml and presets."""
    shutil.copy(REPOSITORY / "presets" / "laptop.yaml", tmp_path / "params.yaml")
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    return tmp_path


def set_to(root: Path, *assignments: str) -> dict[str, Any]:
    """The values, by dotted name, after --set with these."""
    return flat(strict_yaml(changed_params(root, Changes(assignments=assignments))))


def comments(text: str) -> list[str]:
    return re.findall(r"#.*", text)


ALL_CHANGES = {
    "--set": Changes(assignments=("distill.steps=7", "prepare.datasets=[arithmetic]")),
    "--models": Changes(models="offline"),
    "--datasets": Changes(datasets="offline"),
    "--sample-size": Changes(sample_size=12),
    "--skip-non-llm": Changes(skip_non_llm=True),
    "--use-unsloth": Changes(use_unsloth=True),
}

# --- what stays ------------------------------------------------------------------------------


def test_without_changes_the_text_stays_to_the_byte(root: Path) -> None:
    assert changed_params(root, Changes()) == (root / "params.yaml").read_text()


@pytest.mark.parametrize("preset", preset_names(REPOSITORY))
def test_a_preset_is_taken_to_the_byte(root: Path, preset: str) -> None:
    text = changed_params(root, Changes(preset=preset))
    assert text == (root / "presets" / f"{preset}.yaml").read_text()
    assert strict_yaml(text)["preset"] == preset


@pytest.mark.parametrize("option", ALL_CHANGES)
def test_every_option_keeps_all_comments_in_their_order(root: Path, option: str) -> None:
    before = (root / "params.yaml").read_text()
    after = changed_params(root, ALL_CHANGES[option])
    assert comments(after) == comments(before)


@pytest.mark.parametrize("preset", preset_names(REPOSITORY))
def test_setting_one_number_changes_one_line(root: Path, preset: str) -> None:
    before = (root / "presets" / f"{preset}.yaml").read_text().splitlines()
    changes = Changes(preset=preset, assignments=("distill.steps=31",))
    after = changed_params(root, changes).splitlines()
    assert len(after) == len(before)
    differing = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(differing) == 1 and differing[0].lstrip().startswith("steps: 31 ")


@pytest.mark.parametrize("option", ALL_CHANGES)
def test_no_option_writes_anything(root: Path, option: str) -> None:
    before = snapshot(root)
    changed_params(root, ALL_CHANGES[option])
    assert snapshot(root) == before


@pytest.mark.parametrize("option", ALL_CHANGES)
def test_options_change_what_they_name_and_nothing_else(root: Path, option: str) -> None:
    meant = {
        "--set": {"distill.steps": 7, "prepare.datasets": ["arithmetic"]},
        "--models": {"teachers": select("teachers", "offline")},
        "--datasets": {"prepare.datasets": select("datasets", "offline")},
        "--sample-size": {"prepare.sample_size": 12},
        "--skip-non-llm": {},
        "--use-unsloth": {"sft.trainer": "unsloth"},
    }[option]
    before = flat(strict_yaml((root / "params.yaml").read_text()))
    after = flat(strict_yaml(changed_params(root, ALL_CHANGES[option])))
    assert after == {**before, **meant}


def test_options_apply_on_top_of_a_preset(root: Path) -> None:
    changes = Changes(preset="tiny", assignments=("prepare.seed=3",), sample_size=5)
    after = flat(strict_yaml(changed_params(root, changes)))
    tiny = flat(strict_yaml((root / "presets" / "tiny.yaml").read_text()))
    assert after == {**tiny, "prepare.seed": 3, "prepare.sample_size": 5}


def test_a_change_applied_twice_is_as_applied_once(root: Path) -> None:
    changes = Changes(assignments=("distill.learning_rate=2.0e-4",), models="smollm2-135m")
    once = changed_params(root, changes)
    (root / "params.yaml").write_text(once)
    assert changed_params(root, changes) == once


# --- --set -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("distill.steps=600", 600),
        ("distill.learning_rate=0.001", 0.001),
        ("distill.learning_rate=1.0e-4", 1e-4),
        ("distill.learning_rate=1e-4", 1e-4),  # the example in params.yaml itself
        ("distill.learning_rate=0.00001", 1e-5),
        ("distill.anchor_weight=0", 0),
        ("distill.protect=false", False),
        ("distill.student=pruned-24", "pruned-24"),
        ("distill.student='no'", "no"),
        ("distill.student='12'", "12"),
        ("distill.student=a=b", "a=b"),
        ("distill.student=null", None),
        ("prepare.datasets=[arithmetic, python-docs]", ["arithmetic", "python-docs"]),
        ("pipeline.expected.distill.seconds=9", 9),
        ("preset=mine", "mine"),
    ],
)
def test_a_value_arrives_with_its_type(root: Path, assignment: str, value: Any) -> None:
    found = set_to(root, assignment)[assignment.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("preset", preset_names(REPOSITORY))
def test_a_value_is_the_same_for_the_stages_and_for_dvc(root: Path, preset: str) -> None:
    """Both read YAML 1.2, with different libraries."""
    from ruamel.yaml import YAML

    rates = ("1e-4", "0.00001", "3.0e-4", "1")
    for rate in rates:
        changes = Changes(preset=preset, assignments=(f"distill.learning_rate={rate}",))
        text = changed_params(root, changes)
        assert YAML(typ="safe").load(text) == strict_yaml(text), rate


def test_several_assignments_all_count_and_the_last_of_one_name_wins(root: Path) -> None:
    found = set_to(root, "distill.steps=1", "prepare.seed=2", "distill.steps=3")
    assert (found["distill.steps"], found["prepare.seed"]) == (3, 2)


@pytest.mark.parametrize(
    ("assignment", "near"),
    [
        ("distill.step=3", "distill.steps"),
        ("distil.steps=3", "distill.steps"),
        ("prepare.samplesize=3", "prepare.sample_size"),
        ("teacher=a", "teachers"),
    ],
)
def test_an_unknown_knob_is_refused_with_near_ones(root: Path, assignment: str, near: str) -> None:
    with pytest.raises(BadSetting, match=f"Did you mean .*{re.escape(near)}") as refusal:
        set_to(root, assignment)
    assert assignment in str(refusal.value)


@pytest.mark.parametrize("assignment", ["distill.steps", "", "=3", "qqqq=1", "distill=3", "."])
def test_what_is_no_assignment_to_a_knob_is_refused(root: Path, assignment: str) -> None:
    with pytest.raises(BadSetting, match="section.key=value"):
        set_to(root, assignment)


@pytest.mark.parametrize("value", ["[1, 2", "{a: ", '"open', "a: b: c", "\t- x"])
def test_a_value_that_is_no_yaml_is_refused_with_the_option(root: Path, value: str) -> None:
    with pytest.raises(BadSetting, match="--set distill.steps=.*not valid YAML"):
        set_to(root, f"distill.steps={value}")


# --- the file itself -------------------------------------------------------------------------


def test_a_missing_params_file_tells_how_to_get_one(root: Path) -> None:
    (root / "params.yaml").unlink()
    with pytest.raises(BadSetting, match="--preset laptop"):
        changed_params(root, Changes())
    assert changed_params(root, Changes(preset="tiny"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n"])
def test_a_params_file_without_sections_is_refused(root: Path, text: str) -> None:
    (root / "params.yaml").write_text(text)
    with pytest.raises(BadSetting):
        set_to(root, "distill.steps=3")


def test_a_params_file_that_is_no_yaml_is_refused_by_name(root: Path) -> None:
    (root / "params.yaml").write_text("distill: [")
    with pytest.raises(BadSetting, match="params.yaml is not valid YAML"):
        set_to(root, "distill.steps=3")


# --- presets ---------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused_with_all_and_the_nearest(root: Path) -> None:
    with pytest.raises(BadSetting, match="Did you mean laptop") as refusal:
        changed_params(root, Changes(preset="labtop"))
    assert all(name in str(refusal.value) for name in preset_names(root))


@pytest.mark.parametrize("preset", ["../params", "presets/tiny", "", "tiny.yaml"])
def test_a_preset_is_a_name_and_no_path(root: Path, preset: str) -> None:
    with pytest.raises(BadSetting, match="unknown preset"):
        changed_params(root, Changes(preset=preset))


def test_the_params_in_force_have_just_the_knobs_of_every_preset() -> None:
    knobs = {
        path: sorted(flat(strict_yaml(path.read_text())))
        for path in [REPOSITORY / "params.yaml", *(REPOSITORY / "presets").glob("*.yaml")]
    }
    first = next(iter(knobs.values()))
    assert all(found == first for found in knobs.values())


# --- teachers and data sets ------------------------------------------------------------------


def teachers_after(root: Path, **changes: Any) -> list[str]:
    return strict_yaml(changed_params(root, Changes(**changes)))["teachers"]


def test_teachers_are_chosen_by_name_by_tag_or_all(root: Path) -> None:
    assert teachers_after(root, models="qwen3-8b,smollm2-135m") == ["smollm2-135m", "qwen3-8b"]
    assert teachers_after(root, models="offline") == select("teachers", "offline")
    assert teachers_after(root, models="all") == names("teachers")


def test_an_unknown_teacher_is_refused_with_those_that_there_are(root: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean smollm2-135m") as refusal:
        teachers_after(root, models="smolm2-135m")
    assert "mamba-130m" in str(refusal.value) and "offline" in str(refusal.value)


def test_skipping_other_modalities_leaves_language_models_alone(root: Path) -> None:
    left = teachers_after(root, models="all", skip_non_llm=True)
    assert left and all(lookup("teachers", name).is_language_model for name in left)
    assert set(left) < set(names("teachers"))


def test_skipping_works_on_the_teachers_in_force_too(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    both = text.replace("[smollm2-135m]", "[smollm2-135m, whisper-large-v3]")
    (root / "params.yaml").write_text(both)
    assert teachers_after(root, skip_non_llm=True) == ["smollm2-135m"]


def test_a_choice_that_leaves_no_teacher_is_refused(root: Path) -> None:
    with pytest.raises(BadSetting, match="no teacher is left"):
        teachers_after(root, models="whisper-large-v3", skip_non_llm=True)


def test_data_sets_are_chosen_and_unknown_ones_refused(root: Path) -> None:
    after = strict_yaml(changed_params(root, Changes(datasets="arithmetic")))
    assert after["prepare"]["datasets"] == ["arithmetic"]
    with pytest.raises(UnknownName, match="Did you mean arithmetic"):
        changed_params(root, Changes(datasets="aritmetic"))


def test_unsloth_without_a_stage_that_knows_trainers_is_refused(root: Path) -> None:
    lines = (root / "params.yaml").read_text().splitlines(keepends=True)
    without = [line for line in lines if not line.startswith("  trainer:")]
    (root / "params.yaml").write_text("".join(without))
    with pytest.raises(BadSetting, match="--use-unsloth: .*'trainer'; --preset laptop"):
        changed_params(root, Changes(use_unsloth=True))
