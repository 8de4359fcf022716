"""What TRL makes of a batch, for tests/stages/test_trl_reference.py; run by a Python that has TRL.

    trl_losses.py FOLDER

FOLDER has model/ and adapter/, batch.safetensors (TRL's names for its tensors, and `sft.` ones) and
settings.json, a list. Written: losses.json, a loss a setting and then the one of SFT; and
gradients.safetensors, of the adapter's parameters, as NUMBER.NAME.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling.lora import Adapted, open_adapted, trainable

PLAIN = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}


def main(folder: Path) -> None:
    """Compute every loss, each with a model of its own: a trainer changes the one it is given."""
    batch = load_file(folder / "batch.safetensors")
    losses, gradients = [], {}
    settings = json.loads((folder / "settings.json").read_text())
    for number, setting in enumerate([*settings, None]):
        adapted = open_adapted(
            AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "adapter", trains=True
        )
        if setting is None:
            loss = sft_loss(adapted, batch, folder)
        else:
            looked_back = {
                name: batch[f"{number}.{name}"]
                for name in ("old_per_token_logps", "ref_per_token_logps")
            }
            loss = grpo_loss(adapted, {**batch, **looked_back}, setting, folder)
        loss.backward()
        for name, parameter in trainable(adapted):
            gradients[f"{number}.{name}"] = parameter.grad
        losses.append(loss.item())
    (folder / "losses.json").write_text(json.dumps(losses))
    save_file(gradients, folder / "gradients.safetensors")


def grpo_loss(adapted: Adapted, batch: dict, setting: dict, folder: Path) -> torch.Tensor:
    """GRPOTrainer's loss of a batch whose old and reference log-probabilities are given."""
    count = len(batch["advantages"])
    trainer = GRPOTrainer(
        model=adapted,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=count,
            num_generations=count, **setting, **PLAIN,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * count}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # its own loop, which is left out, sets it
    own = batch["completion_mask"] * batch["tool_mask"]
    return trainer._compute_loss(adapted.train(), {**batch, "num_items_in_batch": own.sum()})


def sft_loss(adapted: Adapted, batch: dict, folder: Path) -> torch.Tensor:
    """SFTTrainer's loss of a batch that lies as its collator makes it."""
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(output_dir=str(folder / "trl"), **PLAIN),
        train_dataset=Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    inputs = {name: batch[f"sft.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    counted = (inputs["labels"] != -100).sum()
    return trainer.compute_loss(adapted.train(), inputs, num_items_in_batch=counted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
