"""What a model is, from its configuration and the headers of its weights; no weight is read.

    .venv/bin/python -m modeling.describe smollm2-135m            a registry name,
    .venv/bin/python -m modeling.describe path/to/model.gguf      a GGUF file (converted once),
    .venv/bin/python -m modeling.describe path/to/folder          a transformers folder,
    .venv/bin/python -m modeling.describe org/name                or a hub id

Structure is found, not listed by family: any class of transformers that the configuration names is
opened as a skeleton, its blocks are the lists of modules in it.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from modeling.checkpoint import Packed, read_checkpoint
from modeling.loading import find_anywhere, weights_folder
from modeling.packed import open_packed, stored_places
from modeling.skeleton import OUTSIDE, build_skeleton
from modeling.teacher import read_config

MODALITIES = ("vision", "audio", "video", "speech", "text", "image")


@dataclass(frozen=True)
class Description:
    """A model's facts. Sizes are bytes on disk; None stands for what the model does not state."""

    model_type: str
    model_class: str
    is_causal_language_model: bool
    modalities: tuple[str, ...]
    hidden_size: int | None
    vocabulary: int | None
    context_tokens: int | None
    parameters: int
    types: str  # of the tensors on disk, by share of bytes
    quantised: str | None  # in which forms; they are unpacked when they are used
    blocks: int
    block_class: str
    bytes_total: int
    bytes_largest_block: int
    bytes_outside: int  # embedding, norm, head
    licence: str | None


def describe(folder: Path) -> Description:
    """Describe the model in a transformers folder.

    Raises BadCheckpoint, and ValueError for a class that transformers does not have.
    """
    config = read_config(folder)
    kind = model_class(config)
    checkpoint, config = open_packed(read_checkpoint(folder), config, torch.bfloat16)
    skeleton = build_skeleton(kind, config, checkpoint, torch.bfloat16)
    sizes = {
        part: sum(checkpoint.tensors[name].size for name in names)
        for part, names in skeleton.parts.items()
    }
    types: Counter[str] = Counter()
    for place in stored_places(checkpoint.tensors).values():
        types[str(place.dtype).removeprefix("torch.")] += place.size
    forms = {place.form for place in checkpoint.tensors.values() if isinstance(place, Packed)}
    text = config.get_text_config()
    return Description(
        model_type=config.model_type,
        model_class=kind.__name__,
        is_causal_language_model=kind in causal_class(config),
        modalities=modalities(config),
        hidden_size=getattr(text, "hidden_size", None),
        vocabulary=getattr(text, "vocab_size", None),
        context_tokens=getattr(text, "max_position_embeddings", None),
        parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()),
        types=", ".join(f"{name} {size / types.total():.0%}" for name, size in types.most_common()),
        quantised=", ".join(sorted(forms)) or None,
        blocks=len(skeleton.blocks),
        block_class=" and ".join(dict.fromkeys(type(b).__name__ for b in skeleton.blocks)),
        bytes_total=checkpoint.size,
        bytes_largest_block=max((s for part, s in sizes.items() if part != OUTSIDE), default=0),
        bytes_outside=sizes.get(OUTSIDE, 0),
        licence=licence(folder),
    )


def model_class(config: PreTrainedConfig) -> type:
    """The class that a configuration is for: as it says itself, else its causal LM."""
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if causal := causal_class(config):
        return causal[0]
    raise ValueError(
        f"a {config.model_type} names its class as {config.architectures}, which transformers "
        f"{transformers.__version__} does not have"
    )


def causal_class(config: PreTrainedConfig) -> tuple[type, ...]:
    """The causal language models of a configuration; none for most."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def modalities(config: PreTrainedConfig) -> tuple[str, ...]:
    """What a model takes in, by its parts' configurations; text alone where it has no parts."""
    parts = [name.removesuffix("_config") for name in config.sub_configs]
    found = [m for m in MODALITIES if any(m in part for part in parts)]
    if "vocab_size" in vars(config.get_text_config()) and "text" not in found:
        found.append("text")
    return tuple(found)


def licence(folder: Path) -> str | None:
    """The licence that a model card's first lines state."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def main(arguments: list[str]) -> int:
    """Describe one model, a fact a line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling.describe", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="a registry name, a GGUF file, a folder or a hub id")
    reference = parser.parse_args(arguments).model
    try:
        found = describe(weights_folder(find_anywhere(reference)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for field in fields(found):
        value = getattr(found, field.name)
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{field.name:<26}{', '.join(shown) if isinstance(shown, tuple) else shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
