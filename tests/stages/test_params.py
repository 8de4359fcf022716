"""params.yaml is read strictly: every mistake in it is refused, naming file, section and key."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from registry.strict import BadEntry, build_record
from stages.__main__ import find_stage
from stages.params import read_params_file, read_section, require_at_least, require_within
from tests.tiny import REPOSITORY

GOOD = {"rows": 8, "share": 0.5, "name": "ada", "depths": [0.5, 1.0], "limit": None}


@dataclass(frozen=True)
class Params:
    rows: int
    share: float
    name: str
    depths: tuple[float, ...]
    limit: int | None

    def __post_init__(self) -> None:
        require_at_least(1, rows=self.rows)
        require_within(0.0, 1.0, share=self.share)


def params_file(folder: Path, content: Any) -> Path:
    path = folder / "params.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_section_becomes_its_record(tmp_path: Path) -> None:
    path = params_file(tmp_path, {"other": {}, "train": GOOD})
    assert read_section(path, "train", Params) == Params(8, 0.5, "ada", (0.5, 1.0), None)


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path) -> None:
    found = read_section(params_file(tmp_path, {"train": {**GOOD, "share": 1}}), "train", Params)
    assert type(found.share) is float


REFUSED = {
    "an unknown key": ({"rwos": 8}, "unknown field 'rwos'"),
    "a word for a number": ({"rows": "eight"}, "'rows'.*expected int.*'eight'"),
    "a fraction for a count": ({"rows": 8.5}, "'rows'.*expected int.*8.5"),
    "a truth value for a count": ({"rows": True}, "'rows'.*expected int.*True"),
    "nothing for a number": ({"rows": None}, "'rows'.*expected int.*None"),
    "a number for a word": ({"name": 3}, "'name'.*expected str.*3"),
    "a number for a list": ({"depths": 0.5}, "'depths'.*expected a list.*0.5"),
    "a wrong element of a list": ({"depths": [0.5, "deep"]}, "'depths'.*expected float.*'deep'"),
    "a negative number": ({"rows": -4}, "'rows' is -4; it must be at least 1"),
    "a share above one": ({"share": 1.5}, "'share' is 1.5; it must lie between 0 and 1"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_naming_file_section_and_key(mistake: str, tmp_path: Path) -> None:
    changed, message = REFUSED[mistake]
    path = params_file(tmp_path, {"train": {**GOOD, **changed}})
    with pytest.raises(BadEntry, match=message) as caught:
        read_section(path, "train", Params)
    assert "params.yaml" in str(caught.value) and "'train'" in str(caught.value)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_refused_by_name(key: str, tmp_path: Path) -> None:
    without = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(BadEntry, match=f"section 'train'.*field '{key}' is missing"):
        read_section(params_file(tmp_path, {"train": without}), "train", Params)


def test_a_missing_section_is_refused_by_name(tmp_path: Path) -> None:
    path = params_file(tmp_path, {"tarin": GOOD})
    with pytest.raises(BadEntry, match="params.yaml has no section 'train'"):
        read_section(path, "train", Params)


@pytest.mark.parametrize("content", ["train:\n", "train: 8\n", "train: [rows, share]\n"])
def test_a_section_without_keys_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(BadEntry, match="section 'train'.*expected fields"):
        read_section(params_file(tmp_path, content), "train", Params)


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    text = "train:\n  rows: 8\n  rows: 9\n  share: 0.5\n  name: ada\n  depths: []\n  limit: null\n"
    with pytest.raises(BadEntry, match="'rows'"):
        read_section(params_file(tmp_path, text), "train", Params)


@pytest.mark.parametrize("content", ["", "- train\n", "train: {rows: 8\n"])
def test_a_file_that_holds_no_sections_is_refused_by_name(content: str, tmp_path: Path) -> None:
    with pytest.raises(BadEntry, match="params.yaml"):
        read_params_file(params_file(tmp_path, content))


def test_a_missing_file_says_where_to_take_one_from(tmp_path: Path) -> None:
    with pytest.raises(BadEntry, match="params.yaml is missing; take one from presets/"):
        read_params_file(tmp_path / "params.yaml")


# --- the real sections -----------------------------------------------------------------------

IN_FORCE = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
SECTIONS = [name for name in IN_FORCE if (REPOSITORY / "stages" / name / "stage.py").is_file()]


def counts_of(section: str) -> list[str]:
    record = find_stage(section).params
    return [field.name for field in fields(record) if get_type_hints(record)[field.name] is int]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_params_in_force_are_good(section: str) -> None:
    read_section(REPOSITORY / "params.yaml", section, find_stage(section).params)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_real_section_has_a_default_in_code(section: str) -> None:
    record = find_stage(section).params
    assert {field.name for field in fields(record)} == set(IN_FORCE[section])
    with pytest.raises(TypeError, match=f"missing {len(fields(record))} required"):
        record()


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section in SECTIONS for key in counts_of(section)]
)
def test_no_real_section_takes_a_negative_count(section: str, key: str) -> None:
    changed = {**IN_FORCE[section], key: -1}
    with pytest.raises(BadEntry, match=f"section '{section}'.*'{key}' is -1"):
        build_record(find_stage(section).params, changed, f"params.yaml, section '{section}'")


CONTRADICTIONS = [
    ("prepare", {"datasets": ["python-doc"]}, "unknown dataset 'python-doc'.*python-docs"),
    ("prepare", {"benchmarks": ["human-eval"]}, "unknown benchmark 'human-eval'.*humaneval"),
    ("prepare", {"tokenizer": "smollm"}, "unknown teacher 'smollm'.*smollm2-135m"),
    ("prepare", {"datasets": ["speech-commands"]}, "'speech-commands' is not text"),
    ("prepare", {"near_duplicate": 1.01}, "'near_duplicate' is 1.01"),
    ("prepare", {"row_tokens": 8}, "'row_tokens' is 8; it must be at least 16"),
    ("prepare", {"heldout_share": 0.5, "calibration_share": 0.5}, "heldout_share"),  # no train left
    ("profile", {"ablation_rows": 1}, "'ablation_rows' is 1; it must be at least 2"),
    ("profile", {"resamples": 10}, "'resamples' is 10"),
]


@pytest.mark.parametrize(("section", "changed", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused_before_anything_runs(
    section: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadEntry, match=message):
        build_record(
            find_stage(section).params,
            {**IN_FORCE[section], **changed},
            f"params.yaml, section '{section}'",
        )
