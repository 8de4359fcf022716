"""The structural blocks of a causal language model: what could be cut out of it as one.

All that a layer adds to the residual stream comes out of a few linear layers, and each of these is
a sum over groups of its inputs, W x = sum_g W_g x_g. So the groups are the blocks, and a block's
activation is its part of the linear layer's input:

    head        of attention: its part of the output projection's input
    kv group    the heads that share one key and value head
    neurons     of the MLP: some neighbouring ones, before the down projection
    channels    of a state space's mixer (Mamba): some neighbouring ones, before its output
    expert      of a mixture: its weight for a token, since the layer's output is linear in it
    embedding   of some neighbouring rows of the vocabulary: the state that a token begins with

Where they are is found in the model's own code: in each layer, the linear layer of attention, of
the MLP and of the mixer that a forward pass calls last.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling.blocks import find_blocks

HEAD, KV_GROUP, NEURONS, CHANNELS = "head", "kv group", "neurons", "channels"
WORDS = {  # of a linear layer's name in its layer of the model
    HEAD: ("attn", "attention"),
    CHANNELS: ("mixer", "mamba", "ssm"),
    NEURONS: ("mlp", "ffn", "feed_forward", "fc"),
}


@dataclass(frozen=True)
class Site:
    """A linear layer whose inputs are cut into blocks of equal size.

    module: its name in the model.  layer: from 0.  size: inputs a block.  count: of blocks.
    """

    module: str
    layer: int
    kind: str
    size: int
    count: int


def find_sites(model: PreTrainedModel, neurons: int = 64, channels: int = 64) -> list[Site]:
    """The sites of all layers, in order.

    neurons, channels: how many make a block; the last one of a layer may not be smaller, so they
    must divide what there is. Raises ValueError, saying what was found, for sizes that do not, and
    for a layer in which none of these parts is known.
    """
    place, blocks = find_blocks(model)
    outputs, sizes = _outputs(model), {NEURONS: neurons, CHANNELS: channels}
    sites = []
    for layer in range(len(blocks)):
        found = outputs.get(layer, {})
        if not found:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} calls no linear layer that looks like "
                f"the end of attention, an MLP or a state space ({', '.join(sorted(WORDS))})"
            )
        for kind, name in found.items():
            module = f"{place}.{layer}.{name}"
            inputs = inputs_of(model.get_submodule(module))
            size = sizes.get(kind) or head_size(model, inputs)
            if inputs % size:
                raise ValueError(
                    f"{module} has {inputs} inputs, which are no multiple of {size}; choose a "
                    f"size of '{kind}' that divides them"
                )
            sites.append(Site(module, layer, kind, size, inputs // size))
    return sites


def kv_groups(sites: list[Site], model: PreTrainedModel) -> list[Site]:
    """The sites of attention cut by key and value heads instead of by heads."""
    text = model.config.get_text_config()
    shared = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = text.num_attention_heads // shared
    return [
        Site(site.module, site.layer, KV_GROUP, each * site.size, site.count // each)
        for site in sites
        if site.kind == HEAD
    ]


def inputs_of(module: nn.Module) -> int:
    """How many inputs a linear layer has."""
    return module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features


def head_size(model: PreTrainedModel, inputs: int) -> int:
    """How many of the output projection's inputs are one head's."""
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or inputs // text.num_attention_heads


def _outputs(model: PreTrainedModel) -> dict[int, dict[str, str]]:
    """Layer -> kind -> the linear layer of that kind that is called last, by its name there."""
    _, blocks = find_blocks(model)
    last: dict[int, dict[str, str]] = defaultdict(dict)
    hooks = []
    for layer, block in enumerate(blocks):
        for name, module in block.named_modules():
            kind = kind_of(name)
            if kind and isinstance(module, nn.Linear | Conv1D):

                def called(*_, layer: int = layer, kind: str = kind, name: str = name) -> None:
                    last[layer].pop(kind, None)
                    last[layer][kind] = name

                hooks.append(module.register_forward_pre_hook(called))
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            model(tokens, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return last


def kind_of(name: str) -> str | None:
    """Of which part a linear layer is, by its name in its layer of the model."""
    lowered = name.lower()
    kinds = [kind for kind, words in WORDS.items() if any(word in lowered for word in words)]
    return kinds[0] if kinds else None
