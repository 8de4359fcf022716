"""params.yaml as the command line wants it: presets, --set, and the options that stand for knobs.

The result is text; whoever asked for it decides whether it is written. Comments survive.
"""

import io
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from registry.catalog import UnknownName, lookup, select
from registry.strict import BadEntry, build_record, strict_yaml


class BadSetting(ValueError):
    """An option names something that is not there, or gives it a value that it cannot have."""


@dataclass(frozen=True)
class Options:
    """The section `pipeline` of params.yaml; comments and units stand there."""

    parallel_stages: int
    retries: int
    retry_after_s: float
    checkpoint_every_s: float
    champion_metric: str
    expected: dict

    def __post_init__(self) -> None:
        least = {"parallel_stages": 1, "retries": 0, "retry_after_s": 0, "checkpoint_every_s": 0}
        for name, minimum in least.items():
            if not getattr(self, name) >= minimum:
                found = getattr(self, name)
                raise ValueError(f"'{name}' is {found}; it must be at least {minimum}")


@dataclass(frozen=True)
class Changes:
    """What the command line changes in params.yaml; None or empty leaves things as they are."""

    preset: str | None = None
    assignments: tuple[str, ...] = ()
    models: str | None = None
    datasets: str | None = None
    sample_size: int | None = None
    skip_non_llm: bool = False
    use_unsloth: bool = False


def changed_params(root: Path, changes: Changes) -> str:
    """Give the text of params.yaml with the changes applied; raises BadSetting, UnknownName."""
    path = root / "params.yaml"
    if changes.preset is not None:
        path = _preset(root, changes.preset)
    if not path.is_file():
        raise BadSetting("params.yaml is missing; --preset laptop brings it back")
    text = path.read_text(encoding="utf-8")
    content = _parse(text, path)
    if not isinstance(content, dict):
        raise BadSetting(f"{path.name} has no sections; --preset laptop brings them back")
    edits = _edits(content, changes)
    if not edits:
        return text
    editor = _editor()
    content = editor.load(text)
    for keys, value in edits:
        _assign(content, keys, value)
    buffer = io.StringIO()
    editor.dump(content, buffer)
    return buffer.getvalue()


def read_options(content: dict[str, Any]) -> Options:
    """Check what concerns the run as a whole: the section `pipeline`, and the teachers' names.

    Raises BadEntry, BadSetting or UnknownName. The stages check their own sections.
    """
    teachers = content.get("teachers")
    if not isinstance(teachers, list) or not teachers:
        raise BadSetting(f"params.yaml, 'teachers' is {teachers!r}; write a list such as [NAME]")
    for name in teachers:
        try:
            lookup("teachers", name)
        except UnknownName as error:
            raise BadSetting(f"params.yaml, 'teachers': {error}") from error
    if not isinstance(content.get("preset"), str):
        raise BadSetting("params.yaml has no 'preset'; copy the line from presets/laptop.yaml")
    return build_record(Options, content.get("pipeline"), "params.yaml, section 'pipeline'")


def preset_names(root: Path) -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in (root / "presets").glob("*.yaml"))


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names: {"distill": {"steps": 3}} -> {"distill.steps": 3}."""
    pairs: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value
    return pairs


def _preset(root: Path, name: str) -> Path:
    names = preset_names(root)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadSetting(f"unknown preset '{name}'.{hint} There are {', '.join(names)}")
    return root / "presets" / f"{name}.yaml"


def _edits(content: dict[str, Any], changes: Changes) -> list[tuple[list[str], Any]]:
    edits: list[tuple[list[str], Any]] = []
    teachers = None
    if changes.models is not None:
        teachers = select("teachers", changes.models)
    if changes.skip_non_llm:
        teachers = content["teachers"] if teachers is None else teachers
        teachers = [name for name in teachers if lookup("teachers", name).is_language_model]
    if teachers is not None:
        if not teachers:
            raise BadSetting(
                "no teacher is left after --models and --skip-non-llm; name at least one"
            )
        edits.append((["teachers"], teachers))
    if changes.datasets is not None:
        edits.append((["prepare", "datasets"], select("datasets", changes.datasets)))
    if changes.sample_size is not None:
        edits.append((["prepare", "sample_size"], changes.sample_size))
    if changes.use_unsloth:
        edits += _for_all_stages(content, "trainer", "unsloth", "--use-unsloth")
    for assignment in changes.assignments:
        edits.append(_parse_assignment(content, assignment))
    return edits


def _for_all_stages(content: dict[str, Any], knob: str, value: Any, option: str) -> list:
    sections = [
        name for name, section in content.items() if isinstance(section, dict) and knob in section
    ]
    if not sections:
        raise BadSetting(
            f"{option}: no section of params.yaml has the knob '{knob}'; --preset laptop brings it "
            "back"
        )
    return [([section, knob], value) for section in sections]


def _parse_assignment(content: dict[str, Any], assignment: str) -> tuple[list[str], Any]:
    name, equals, text = assignment.partition("=")
    known = flat(content)
    if not equals or name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " See params.yaml for all names."
        raise BadSetting(f"--set {assignment}: give section.key=value with a name there is.{hint}")
    return name.split("."), _parse(text, Path(f"--set {assignment}"))


def _assign(content: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def _editor() -> YAML:
    """A YAML reader and writer that keeps comments."""
    editor = YAML()
    editor.width = 400  # a line that a person wrote stays one
    editor.preserve_quotes = True
    editor.indent(mapping=2, sequence=4, offset=2)  # as the presets do
    return editor


def _parse(text: str, path: Path) -> Any:
    try:
        return strict_yaml(text)
    except (yaml.YAMLError, BadEntry) as error:
        raise BadSetting(f"{path} is not valid YAML: {error}") from error
