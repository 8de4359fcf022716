"""Drawing tokens: the right frequencies, the right log-probabilities, never a token of none."""

from itertools import product

import pytest
import torch

from runtime.generation.answers import Row
from runtime.generation.drawing import draw, invert, nucleus

LOGITS = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 3


def evenly(draws: int) -> list[float]:
    """Numbers that fill [0, 1) evenly."""
    return [(i + 0.5) / draws for i in range(draws)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    draws = 4_000
    tokens, log_probs = draw(LOGITS.expand(draws, -1), evenly(draws), temperature, 1.0)
    expected = (LOGITS[0] / temperature).softmax(-1)
    found = torch.bincount(torch.tensor(tokens), minlength=1000) / draws
    assert (found - expected).abs().max() <= 1.5 / draws
    assert log_probs == pytest.approx(expected.log()[tokens].tolist(), abs=1e-4)


def test_greedy_takes_the_likeliest_with_its_log_probability() -> None:
    tokens, log_probs = draw(LOGITS, [0.99], 0, 1.0)
    assert tokens == [LOGITS.argmax().item()]
    assert log_probs == pytest.approx([LOGITS.log_softmax(-1).max().item()], abs=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [10, 1000, 10_000])
def test_a_nucleus_is_the_fewest_tokens_that_hold_the_share(share: float, size: int) -> None:
    probabilities = torch.rand(3, size).pow(3)
    probabilities /= probabilities.sum(-1, keepdim=True)
    for row, kept in zip(probabilities, nucleus(probabilities, share), strict=True):
        chosen = kept > 0
        ordered = row.sort(descending=True).values.double()
        fewest = int((ordered.cumsum(-1) < share - 1e-6).sum()) + 1
        assert abs(int(chosen.sum()) - fewest) <= 1  # rounding of the sum
        assert row[chosen].min() >= row[~chosen].max()
        assert torch.equal(kept[chosen], row[chosen])


def test_top_p_changes_what_is_drawn_and_not_the_log_probabilities() -> None:
    tokens, log_probs = draw(LOGITS.expand(500, -1), evenly(500), 1.0, 0.3)
    assert log_probs == pytest.approx(LOGITS[0].log_softmax(-1)[tokens].tolist(), abs=1e-4)
    assert set(tokens) < set(LOGITS[0].topk(50).indices.tolist())


@pytest.mark.parametrize("size", [3, 256, 257, 1000])
def test_a_token_of_probability_zero_is_never_drawn(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        only = torch.zeros(3, size)
        only[:, place] = 0.3
        numbers = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
        assert invert(only, numbers).flatten().tolist() == [place] * 3


def test_random_numbers_are_even_and_each_place_has_its_own() -> None:
    numbers = [
        Row(prompt, candidate, 9, log_probs=[0.0] * index).uniform(seed)
        for seed, prompt, candidate, index in product(range(5), range(10), range(10), range(9))
    ]
    assert len(set(numbers)) == len(numbers)
    counts = torch.histc(torch.tensor(numbers), 10, 0, 1)
    assert counts.sum() == len(numbers) and (counts - 450).abs().max() < 100
