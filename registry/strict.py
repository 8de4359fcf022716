"""Read a YAML mapping of entries into frozen dataclasses, and refuse anything unexpected.

A misspelt field that is silently ignored costs a training run; here it is an error that names the
file, the entry and the field. The dataclass is the schema: a field without a default must be
written in the file (null counts as written), a field with a default may be left out.
"""

import re
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

Record = TypeVar("Record")


class BadEntry(ValueError):
    """A registry file says something that its record does not allow."""


class _NoRepeatedKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key written twice is an error, not a silent overwrite.

    And it reads YAML 1.2, as DVC does: 1e-4 is a number, and "no" is a word.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                at = key_node.start_mark
                raise BadEntry(f"{at.name}, line {at.line + 1}: field '{key}' again; keep one")
            seen.append(key)
        return super().construct_mapping(node, deep)


_NoRepeatedKeys.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_NoRepeatedKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"
    ),
    list("-+0123456789."),
)


def strict_yaml(source: Path | str) -> Any:
    """Read a YAML file, or text, in which no key stands twice; raises BadEntry otherwise."""
    if isinstance(source, str):
        return yaml.load(source, Loader=_NoRepeatedKeys)
    with source.open("rb") as stream:  # a stream, not its text, so that errors name the file
        return yaml.load(stream, Loader=_NoRepeatedKeys)


def read_entries(path: Path, record: type[Record]) -> dict[str, Record]:
    """Give the entries of one YAML file by name, in the order of the file.

    Raises FileNotFoundError when there is no such file, and BadEntry, naming file, entry and
    field, when the file is not a mapping from names to entries of the kind `record`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a registry folder holds one file a kind")
    try:
        raw_entries = strict_yaml(path)
    except yaml.YAMLError as error:
        raise BadEntry(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw_entries, dict):
        raise BadEntry(
            f"{path} holds a {type(raw_entries).__name__}; write a mapping of entries ('NAME: ...')"
        )
    return {name: _entry(record, name, raw, path) for name, raw in raw_entries.items()}


def _entry(record: type[Record], name: Any, raw: Any, path: Path) -> Record:
    """Make one record; its name is its key, which DVC can track apart from the other entries."""
    where = f"{path}, entry {name!r}"
    if not re.fullmatch(r"[a-z0-9-]+", str(name)):  # a dot would split it in DVC's params
        raise BadEntry(f"{where}: a name is made of a-z, 0-9 and '-' alone; rename it")
    if not isinstance(raw, dict):
        raise BadEntry(f"{where}: expected fields ('key: value'), found {raw!r}")
    if "name" in raw:
        raise BadEntry(f"{where}: unknown field 'name'; the entry's key is its name")
    return build_record(record, {"name": name, **raw}, where)


def build_record(record: type[Record], raw: Any, where: str) -> Record:
    """Make one record from one YAML mapping, refusing unknown and missing fields and wrong types.

    `where` begins every error message (BadEntry); what the record's own __post_init__ refuses with
    a ValueError is passed on behind it.
    """
    if not isinstance(raw, dict):
        raise BadEntry(f"{where}: expected fields ('key: value'), found {raw!r}")
    known = {field.name: field for field in fields(record)}
    for key in raw:
        if key not in known:
            raise BadEntry(
                f"{where}: unknown field '{key}'; correct it or remove it. "
                f"The fields are {', '.join(known)}"
            )
    for key, field in known.items():
        if key not in raw and field.default is MISSING:
            raise BadEntry(f"{where}: field '{key}' is missing; add it (null where there is none)")
    hints = get_type_hints(record)
    values = {key: _convert(raw[key], hints[key], f"{where}, field '{key}'") for key in raw}
    try:
        return record(**values)
    except ValueError as error:  # what the record itself refuses, in its __post_init__
        raise BadEntry(f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check one YAML value against a field's type; lists become tuples, mappings become records."""
    if isinstance(hint, types.UnionType):  # in this package always `X | None`
        if value is None:
            return None
        hint = next(choice for choice in get_args(hint) if choice is not types.NoneType)
    if is_dataclass(hint):
        return build_record(hint, value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise BadEntry(f"{where}: expected a list such as [a, b], found {value!r}")
        return tuple(_convert(item, get_args(hint)[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: True is an int in Python, but not a count
        raise BadEntry(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
