"""Rows that share their beginnings: laid out whole, and computed as if each were alone."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling.fast_path import fast_path
from modeling.forests import plant
from modeling.shared_prefixes import forest_states, shares_prefixes
from tests.modeling.test_fast_path import family
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

SYSTEM, FIRST, SECOND = [1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]
ROWS = [
    [*SYSTEM, *FIRST, 20, 21, 22, 23],
    [*SYSTEM, *SECOND, 30],
    [*SYSTEM, *FIRST, 24],
    [*SYSTEM, *SECOND, 31, 32],
    [*SYSTEM, *FIRST],
    [50, 51],
    [*SYSTEM, *SECOND, 30],
]


@pytest.mark.parametrize("least", [1, 3, 100])
def test_a_forest_has_every_row_and_what_is_shared_once(least: int) -> None:
    forest = plant(ROWS, least)
    for row, places in zip(ROWS, forest.rows, strict=True):
        assert forest.tokens[0, places].tolist() == row
        assert forest.positions[0, places].tolist() == list(range(len(row)))
    counts = {
        1: 5 + 3 + 4 + 4 + 1 + 1 + 2 + 2,
        3: 5 + 3 + 4 + 4 + 1 + 1 + 1 + 2 + 2,
        100: sum(map(len, ROWS)),
    }
    assert forest.tokens.shape[1] == counts[least]
    assert sum(len(batch.real) for batch in forest.batches) == counts[least]


def test_rows_that_are_alike_are_one() -> None:
    forest = plant([[1, 2, 3]] * 3, 2)
    assert forest.tokens.tolist() == [[1, 2, 3]]
    assert [places.tolist() for places in forest.rows] == [[0, 1, 2]] * 3


def states_and_gradients(model, shared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States of each row, and gradients of a sum in which every number counts differently."""
    model.requires_grad_(True).zero_grad()
    if shared:
        forest = plant(ROWS, 2)
        hidden = forest_states(model, forest)
        found = [hidden[places] for places in forest.rows]
    else:
        found = [model.base_model(torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    torch.manual_seed(0)
    sum((states * torch.randn_like(states)).sum() for states in found).backward()
    gradients = [p.grad.clone() for p in model.base_model.parameters()]
    return [states.detach() for states in found], gradients


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("fast", [False, True])
def test_states_and_gradients_are_those_of_rows_alone(make, fast: bool) -> None:
    model = make().double()
    alone = states_and_gradients(model, shared=False)
    if fast:
        with fast_path(model, print):
            shared = states_and_gradients(model, shared=True)
    else:
        shared = states_and_gradients(model, shared=True)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)  # norms are in float32
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("model", "shares"),
    [
        (tiny_llama(), True),
        (tiny_llama().bfloat16(), True),
        (tiny_gpt2(), True),
        (family(Qwen3ForCausalLM, Qwen3Config), True),
        (tiny_mamba(), False),  # a recurrent state
        (family(MistralForCausalLM, MistralConfig, sliding_window=8), False),
        (family(Gemma2ForCausalLM, Gemma2Config), False),  # windows, and capped scores
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_shares_where_attention_is_all_that_joins_tokens(model, shares: bool) -> None:
    assert shares_prefixes(model) is shares
