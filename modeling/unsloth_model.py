"""A model and its adapter as unsloth opens them, to be trained on a GPU.

The only place that imports unsloth. It replaces methods of the classes of transformers, PEFT and
TRL for the whole process, after which a model of the same class that it has not opened fails at its
first forward (unslothai/unsloth, issue 1713). So it belongs into a process of its own, and is
imported before the others there, as it asks for: stages/sft/unsloth_process.py sees to both.

Written after unsloth's documentation; not run yet, for want of a GPU.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase
from unsloth import FastLanguageModel

from modeling.lora import Adapted


def open_with_unsloth(folder: Path, most_tokens: int) -> tuple[Adapted, PreTrainedTokenizerBase]:
    """Open the adapter in a folder and the model that its adapter_config.json names, to go on.

    most_tokens: of a row.  Weights keep their 16 bits; activations are checkpointed, as unsloth
    does where it is not told otherwise.
    """
    return FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=most_tokens, dtype=None, load_in_4bit=False
    )
