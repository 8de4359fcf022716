"""Read params.yaml strictly: a section becomes a frozen dataclass, anything unexpected an error.

There are no defaults in code: params.yaml is the one place for values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from registry.strict import BadEntry, build_record, strict_yaml

Params = TypeVar("Params")


def read_params_file(path: Path) -> dict[str, Any]:
    """Give the whole of params.yaml as a dictionary; raises BadEntry when it cannot be one."""
    if not path.is_file():
        raise BadEntry(f"{path} is missing; take one from presets/ (cp presets/laptop.yaml {path})")
    try:
        content = strict_yaml(path)
    except yaml.YAMLError as error:
        raise BadEntry(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadEntry(f"{path} holds a {type(content).__name__}; write 'section:' blocks")
    return content


def read_section(path: Path, section: str, record: type[Params]) -> Params:
    """Give one section of params.yaml as `record`; raises BadEntry naming file, section and key."""
    content = read_params_file(path)
    if section not in content:
        raise BadEntry(f"{path.name} has no section '{section}'; copy it from presets/laptop.yaml")
    return build_record(record, content[section], f"{path.name}, section '{section}'")


def require_at_least(minimum: float, **values: float) -> None:
    """Refuse values below a minimum, by name; for a Params' __post_init__."""
    for name, value in values.items():
        if not value >= minimum:  # so that nan is refused too
            raise ValueError(f"'{name}' is {value}; it must be at least {minimum:g}")


def require_within(low: float, high: float, **values: float) -> None:
    """Refuse values outside [low, high], by name; for a Params' __post_init__."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"'{name}' is {value}; it must lie between {low:g} and {high:g}")


def require_one_of(choices: Sequence[str], **values: str) -> None:
    """Refuse values that are no choice, by name; for a Params' __post_init__."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"'{name}' is '{value}'; it must be one of {', '.join(choices)}")
