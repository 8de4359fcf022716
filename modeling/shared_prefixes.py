"""Compute what several rows begin with only once, forward and backward, with exact results.

Conversations begin with the same instructions, and all answers to a question with the question. In
a model whose tokens meet in causal attention alone, a token's states depend on nothing behind it,
so rows that begin alike have the same states there: they are laid out as a trie (forests.py).

    forest = plant(rows)
    hidden = forest_states(model, forest)       # (N, D)
    hidden[forest.rows[1]]                      # the states of the second row

Every layer but attention works on the N tokens as they lie; attention is replaced, by transformers'
own registry, for the time of the call. A shared token's gradient is the sum of all rows'. The
results are the model's own to rounding.

Letters: N tokens, H query heads, K key/value heads, C width of a head, D hidden width; B, T and S
as in forests.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from modeling.attention import attention_by, configs_of
from modeling.forests import Forest, plant

ATTENTION = "nanofoundry_forest"  # the name in transformers' registry
KNOWN = ("sdpa", "nanofoundry_causal")  # causal attention without anything else (fast_path.py)
PROBE = ([5, 3, 8, 1, 9, 2], [5, 3, 8, 1, 4], [8, 5, 2])  # token ids; that they share matters
TOLERANCE = 1e-4  # in float32; of other types their own resolution


def forest_states(model: PreTrainedModel, forest: Forest) -> Tensor:
    """Hidden states behind the final norm of a forest's tokens: (N, D).

    Raises ValueError for a model that `shares_prefixes` refuses.
    """
    where = model.device
    with attention_by(configs_of(model), ATTENTION, partial(_attend, forest), _no_mask):
        found = model.base_model(
            forest.tokens.to(where), position_ids=forest.positions.to(where), use_cache=False
        )
    return found.last_hidden_state[0]


@torch.no_grad()
def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether a model's states are the same when beginnings are shared: tried on a few tokens.

    False where something but full causal attention joins tokens: a recurrent state, a convolution,
    a window (which so few tokens would not show).
    """
    text = model.config.get_text_config()
    windows = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    implementations = {config._attn_implementation for config in configs_of(model)}
    if any(windows) or kinds != {"full_attention"} or not implementations <= set(KNOWN):
        return False
    rows = [[token % text.vocab_size for token in row] for row in PROBE]
    forest = plant(rows, least_shared=2)
    try:
        shared = forest_states(model, forest)
    except (TypeError, ValueError):  # no positions are taken, or attention has more to it
        return False
    for row, places in zip(rows, forest.rows, strict=True):
        tokens = torch.tensor([row], device=model.device)
        alone = model.base_model(tokens, use_cache=False).last_hidden_state[0]
        error = (shared[places.to(model.device)] - alone).norm() / alone.norm()
        if not error <= max(TOLERANCE, 2 * torch.finfo(alone.dtype).eps):
            return False
    return True


def _no_mask(*_arguments: Any, **_named: Any) -> None:
    """A forest's batches have masks of their own."""


def _attend(
    forest: Forest,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (1, H, N, C), key and value (1, K, N, C).

    Gives (1, N, H, C). Raises ValueError for what changes the scores besides.
    """
    if dropout or softcap or s_aux is not None or position_bias is not None:
        raise ValueError(
            f"{type(module).__name__} has dropout, a cap, a sink or a bias in its attention; rows "
            "cannot share their beginnings there"
        )
    parts = []
    for batch in forest.batches:
        q = _take(query, batch.queries)
        k, v = _take(key, batch.keys), _take(value, batch.keys)
        mixed = scaled_dot_product_attention(
            q, k, v, batch.seen.to(q.device), scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )  # (B, H, T, C)
        found = mixed.transpose(1, 2).flatten(0, 1)  # (B T, H, C)
        parts.append(found.index_select(0, batch.real.to(q.device)))
    return torch.cat(parts)[None], None  # batches are in the order of places


def _take(heads: Tensor, places: Tensor) -> Tensor:
    """Tokens of (1, H, N, C) by place (B, T): (B, H, T, C)."""
    flat = heads[0].transpose(0, 1).index_select(0, places.flatten().to(heads.device))
    return flat.unflatten(0, places.shape).transpose(1, 2)
