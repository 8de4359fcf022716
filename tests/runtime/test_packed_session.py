"""Sessions give the model's own logits, however rows are fed and in whatever order they go."""

import random

import pytest
import torch

from runtime.generation.any_model import CachedSession
from runtime.generation.packed_model import PackedModel
from runtime.generation.packed_session import PREFILLED_AT_ONCE, PackedSession, spans
from runtime.generation.row_attention import Groups
from tests.tiny import tiny_llama

VOCABULARY = 97


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def own_logits(rows: list[list[int]]) -> torch.Tensor:
    """The logits behind whole rows, each in a forward of its own."""
    model = tiny_llama()
    logits = [model(torch.tensor([row])).logits[0, -1] for row in rows]
    return torch.stack(logits) if rows else torch.empty(0, VOCABULARY)


@pytest.mark.parametrize("kind", ["packed", "cached"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_fed_and_dropped_at_random_get_the_models_own_logits(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    prompts = [random_tokens(chance, chance.randint(1, 14)) for _ in range(4)]
    if kind == "packed":
        session = PackedSession(PackedModel(tiny_llama(), False), prompts, 3)
    else:
        session = CachedSession(tiny_llama(), prompts, 3)
    rows = [list(prompt) for prompt in prompts for _ in range(3)]
    ready, logits = session.start()
    while True:
        torch.testing.assert_close(
            logits, own_logits([rows[r] for r in ready]), atol=2e-4, rtol=1e-3
        )
        gone = chance.sample(ready, min(len(ready), chance.choice([0, 0, 1, 2])))
        if len(gone) == len(rows):
            break
        if gone:
            rows = [rows[place] for place in session.drop(gone)]
            ready = session._ready()
        fed = [[] for _ in rows]
        for place in ready:
            length = 20 if chance.random() < 0.05 else chance.choice([1, 1, 1, 3])
            fed[place] = random_tokens(chance, length)
            rows[place] += fed[place]
        if max(map(len, rows)) > 110:
            break
        ready, logits = session.step(fed)


def random_tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(count)]


def test_room_grows_when_rows_get_longer_than_it() -> None:
    session = PackedSession(PackedModel(tiny_llama(), False), [[1, 2]], 2)
    row = [1, 2]
    for token in range(70):
        row.append(token)
        _, logits = session.step([[token], [token]])
    torch.testing.assert_close(logits, own_logits([row, row]), atol=2e-4, rtol=1e-3)


def test_prompts_are_read_in_parts_that_are_not_too_long() -> None:
    half = PREFILLED_AT_ONCE // 2
    lengths = [half, half, 1, 2 * half + 5, 3]
    assert list(spans(lengths)) == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_groups_with_fewer_rows_are_filled_up() -> None:
    groups = Groups.of([0, 1, 0, 0])
    assert groups.members.tolist() == [0, 2, 3, 1, 1, 1] and groups.places.tolist() == [0, 3, 1, 2]
    by_row = torch.arange(4.0)[:, None]
    assert torch.equal(groups.scatter(groups.gather(by_row, 2)), by_row)
    assert Groups.of([0, 0, 1, 1]).in_order and not groups.in_order
