"""Pooled states are the mean of the query's own tokens behind a block, and nothing else."""

import torch

from modeling.pooled_states import MOST_TOKENS, bounds, pooled_states
from tests.tiny import tiny_llama


def test_they_are_the_means_of_the_models_own_states() -> None:
    model = tiny_llama()
    prompts = [[5, 3, 8, 1, 9, 2], [7, 7, 1, 4, 2, 6]]
    found = pooled_states(model, prompts, [(2, 5), (2, 5)], [1, 2])
    with torch.no_grad():
        own = model(torch.tensor(prompts), output_hidden_states=True).hidden_states
    assert torch.allclose(found[:, 0], own[1][:, 2:5].mean(1), atol=1e-6)


def test_what_stands_behind_the_query_changes_nothing() -> None:
    model = tiny_llama()
    one = pooled_states(model, [[5, 3, 8, 1]], [(1, 3)], [2])
    other = pooled_states(model, [[5, 3, 8, 9, 9, 9]], [(1, 3)], [2])
    assert torch.allclose(one, other, atol=1e-6)


def test_an_empty_query_has_the_state_in_front_of_it_and_a_long_one_its_first_tokens() -> None:
    assert bounds((4, 4)) == (3, 4)
    assert bounds((0, 0)) == (0, 1)
    assert bounds((4, 10)) == (4, 10)
    assert bounds((4, 10_000)) == (4, 4 + MOST_TOKENS)
