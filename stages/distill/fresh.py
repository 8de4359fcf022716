"""Build a student that is a new network: a Llama or a Mamba of any size, with random weights.

It has the teacher's vocabulary and tied embeddings. Nothing else of the teacher fits, but the
embedding is started from the teacher's: centred, projected onto its principal directions where the
student is narrower (the best embedding of that width in the least squares sense, Eckart 1936), and
scaled to the size of a fresh one. The map back, the lift, is where the anchors' maps start.

Letters: V vocabulary, D hidden width of the teacher, D' of the student.
"""

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from registry.records import Student


def build_new(student: Student, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A new network of the entry's shape, of the teacher's type, ready to be trained.

    Raises ValueError for a vocabulary that is smaller than the teacher's.
    """
    config = CONFIGS[student.construction](student, teacher.config.get_text_config())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    return model.to(teacher.device).eval().requires_grad_(False)


def _llama(student: Student, teacher: PreTrainedConfig) -> LlamaConfig:
    shape = student.shape
    return LlamaConfig(
        **_shared(student, teacher),
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=getattr(teacher, "max_position_embeddings", 2048),
    )


def _mamba(student: Student, teacher: PreTrainedConfig) -> MambaConfig:
    return MambaConfig(**_shared(student, teacher), state_size=student.shape.state)


def _shared(student: Student, teacher: PreTrainedConfig) -> dict:
    vocabulary = student.shape.vocab or teacher.vocab_size
    if vocabulary < teacher.vocab_size:
        raise ValueError(
            f"student '{student.name}' has a vocabulary of {vocabulary}, its teacher of "
            f"{teacher.vocab_size}; set 'vocab' to null in registry/students.yaml"
        )
    return {
        "hidden_size": student.shape.hidden,
        "num_hidden_layers": student.shape.blocks,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": teacher.bos_token_id,
        "eos_token_id": teacher.eos_token_id,
        "pad_token_id": teacher.pad_token_id,
    }


CONFIGS = {"llama": _llama, "mamba": _mamba}


@torch.no_grad()
def start_embedding(student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
    """Start the student's embedding from the teacher's, in place; gives the lift (D, D').

    Directions beyond the teacher's width, and rows beyond its vocabulary, stay random. The lift
    takes a row of the student's embedding as near to the teacher's as its width allows.
    """
    source = teacher.get_input_embeddings().weight.float()  # (V, D)
    source = source - source.mean(0)  # what all tokens have in common tells none apart
    target = student.get_input_embeddings().weight
    size = target.float().std()
    count = min(source.shape[1], target.shape[1])
    _, directions = torch.linalg.eigh(source.T @ source)  # ascending
    directions = directions.flip(1)[:, :count]  # (D, count)
    projected = source @ directions
    scale = size / projected.std()
    target[: len(source), :count] = (projected * scale).to(target.dtype)
    lift = torch.zeros(source.shape[1], target.shape[1], device=source.device)
    lift[:, :count] = directions / scale
    return lift
