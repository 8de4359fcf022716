"""A stand-in for unsloth: it opens an adapter and its model with PEFT, and breaks all other models.

So does the real one: it replaces methods of transformers' classes, which then want what only models
that it has opened have.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaModel


class FastLanguageModel:
    """The one method that is used, with the arguments that are given."""

    @staticmethod
    def from_pretrained(
        model_name: str, max_seq_length: int, dtype: torch.dtype | None, load_in_4bit: bool
    ):
        """Open the adapter in a folder, and the model that its configuration names."""
        assert dtype is None and not load_in_4bit and max_seq_length > 0
        config = json.loads((Path(model_name) / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        _mark(model)
        adapted = PeftModel.from_pretrained(model, model_name, is_trainable=True)
        return adapted, AutoTokenizer.from_pretrained(base)


def _mark(model: torch.nn.Module) -> None:
    stock = LlamaModel.forward

    def forward(self, *arguments, **named):
        if not getattr(self, "opened_by_unsloth", False):
            raise AttributeError("'LlamaAttention' object has no attribute 'apply_qkv'")
        return stock(self, *arguments, **named)

    LlamaModel.forward = forward
    model.model.opened_by_unsloth = True
