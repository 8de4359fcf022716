"""Checksums: of files, of folders, and of everything a stage's result depends on."""

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from registry.strict import strict_yaml
from stages.declaration import Declaration

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


class Damaged(ValueError):
    """A file does not have the content that it was written with."""


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(value: Any) -> str:
    """The SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and checksum of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")


def verify_manifest(folder: Path, what_to_do: str) -> None:
    """Raise Damaged, naming the file, unless every file is as manifest.json says."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise Damaged(f"{folder}/{MANIFEST} is missing or unreadable; {what_to_do}") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing; {what_to_do}")
        if path.stat().st_size != entry["bytes"]:
            found = path.stat().st_size
            raise Damaged(f"{path} has {found} bytes, not {entry['bytes']}; {what_to_do}")
        if file_digest(path) != entry["sha256"]:
            raise Damaged(f"{path} is damaged (its checksum differs); {what_to_do}")


def fingerprint(root: Path, declaration: Declaration) -> str:
    """Hash all that decides a stage's result: parameters, inputs, code and library versions.

    A checkpoint is resumed only under the fingerprint that it was made with.
    """
    parts = {
        "node": declaration.node,
        "params": {file: _keys(root / file, keys) for file, keys in declaration.params},
        "inputs": {dep: _artifact_digest(root / dep) for dep in declaration.inputs.values()},
        "code": {dep: _code_digest(root / dep) for dep in declaration.code},
        "python": sys.version_info[:2],
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
    return text_digest(parts)


def _keys(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    content = strict_yaml(path)
    for key in keys:
        if key not in content:
            raise ValueError(f"{path.name} has no '{key}'; it has {', '.join(content)}")
    return {key: content[key] for key in keys}


def _artifact_digest(path: Path) -> list[str]:
    """Digests of the manifests below an artifact: one, or one a teacher."""
    return [file_digest(manifest) for manifest in sorted(path.rglob(MANIFEST))]


def _code_digest(path: Path) -> list[str]:
    if path.is_file():
        return [file_digest(path)]
    kinds = {".py", ".yaml", ".html"}
    sources = sorted(source for source in path.rglob("*") if source.suffix in kinds)
    return [source.relative_to(path).as_posix() + file_digest(source) for source in sources]
