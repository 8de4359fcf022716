"""Small real language models to test with, of some thousand parameters.

    tiny_llama(), tiny_gpt2(), tiny_mamba()   random weights, float32, evaluation mode, on the CPU

A project to run stages in is in tests/stages/project.py. transformers is imported only by those
functions that need it.
"""

from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def tiny_llama(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A LlamaForCausalLM with grouped query attention: 4 heads, 2 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(LlamaForCausalLM, config, seed)


def tiny_gpt2(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A GPT2LMHeadModel: learned positions, LayerNorm, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=width,
        n_layer=blocks,
        n_head=4,
        n_positions=128,
        vocab_size=vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(GPT2LMHeadModel, config, seed)


def tiny_mamba(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A MambaForCausalLM: state space blocks, no attention; slow kernels, but tiny."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        vocab_size=vocab,
        state_size=4,
        time_step_rank=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(MambaForCausalLM, config, seed)


def _random(kind: type, config: Any, seed: int):
    """Weights ten times larger than a fresh model's, so that every block makes a difference."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config.initializer_range = 0.2
        model = kind(config)
    return model.float().eval().requires_grad_(False)
