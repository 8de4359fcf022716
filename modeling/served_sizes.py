"""What the shapes of a model's tensors say of the room that serving it takes.

Read from a checkpoint's headers, so that blocks may have heads and neurons of their own number.
Three sizes: the packed copy of the matrices (runtime/generation/products.py), the keys and values
of a token, and what a token takes while its prompt is read.

Letters: D hidden width, F outputs and K inputs of a matrix, I neurons of the MLP.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
JOINED = {  # matrices of a block by the product that they are packed for
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip
IN_BLOCK = re.compile(r"^(?P<block>.*\.\d+)\..*?(?P<role>[a-z]+_proj)\.weight$")
INPUTS, OUTPUTS = 512, 16  # FBGEMM's block: a packed matrix has multiples of both
HALF = torch.float16.itemsize


def packed_bytes(shapes: Shapes, dtype: torch.dtype, packing: str | None) -> int:
    """Bytes of a second, packed copy of a model's matrices; 0 where there is none.

    "float16" is FBGEMM's, filled up to whole blocks: 576 inputs take the room of 1,024. "onednn"
    has the weights' own type. A model that is not like Llama is not packed. Not foreseen: a matrix
    with a number above float16's largest, which stays float32.
    """
    products = _products(shapes)
    if packing in (None, "plain") or not products:
        return 0
    if packing == "onednn":
        return sum(rows * inputs for rows, inputs in products) * dtype.itemsize
    if packing != "float16":
        raise ValueError(f"packing '{packing}' is unknown; there are float16, onednn, plain")
    return sum(_up(rows, OUTPUTS) * _up(inputs, INPUTS) for rows, inputs in products) * HALF


def values_a_token(shapes: Shapes, config: PreTrainedConfig) -> int:
    """Numbers of the keys and values of one token in all blocks.

    Raises ValueError for a model that has neither k_proj and v_proj nor says its heads.
    """
    own = [
        shape[0]
        for name, shape in shapes.items()
        if (found := IN_BLOCK.match(name)) and found["role"] in ("k_proj", "v_proj")
    ]
    if own:
        return sum(own)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(
            f"a {config.model_type} has no attention heads; memory is planned for models that keep "
            "keys and values"
        )
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kept * size


def activations_a_token(shapes: Shapes, config: PreTrainedConfig, packed: bool) -> int:
    """Numbers that a token takes at the most while a prompt is read, in the widest block.

    Packed: a block's joined matrices give their outputs while those of the block before are still
    held by name. Else: what transformers' own block has at its MLP.
    """
    hidden = config.hidden_size
    widths: dict[str, int] = defaultdict(int)  # of each role, in the block where it is widest
    for name, shape in shapes.items():
        if found := IN_BLOCK.match(name):
            widths[found["role"]] = max(widths[found["role"]], shape[0])
    queries, keys, values = (widths[role] for role in ("q_proj", "k_proj", "v_proj"))
    inner = widths["gate_proj"] or 4 * hidden
    attention = 2 * (queries + keys) + values + queries  # qkv, turned q and k, what was attended
    if not packed:
        return 4 * inner + 8 * hidden + attention
    angles = 3 * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    return 2 * hidden + angles + attention + 4 * inner


def _products(shapes: Shapes) -> list[tuple[int, int]]:
    """Outputs and inputs of what is packed, the head too; nothing for a model not like Llama."""
    rows: dict[tuple[str, str], int] = defaultdict(int)
    inputs: dict[tuple[str, str], int] = {}
    roles: dict[str, set[str]] = defaultdict(set)
    for name, shape in shapes.items():
        found = IN_BLOCK.match(name)
        if found and found["role"] in JOINED and len(shape) == 2:
            place = found["block"], JOINED[found["role"]]
            roles[found["block"]].add(found["role"])
            rows[place] += shape[0]
            inputs[place] = shape[1]
    if not roles or any(set(JOINED) != own for own in roles.values()):
        return []
    heads = [n for n in shapes if n.endswith(HEAD)] or [n for n in shapes if n.endswith(EMBEDDING)]
    return [(rows[place], inputs[place]) for place in rows] + [shapes[name] for name in heads[:1]]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
