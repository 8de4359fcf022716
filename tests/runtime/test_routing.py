"""Adapters that a router chooses while prompts are read: what they say, and what is read again."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.pooled_states import pooled_states
from modeling.router import BadRouter, Router, RouterShape
from runtime.adapters.bank import AdapterBank
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens, request_edges
from tests.runtime.adapting import adapter_folder
from tests.runtime.conversing import letters
from tests.tiny import tiny_llama, tiny_mamba

KINDS = {"packed": tiny_llama, "cached": tiny_llama, "mamba": tiny_mamba}
NAMES = ("early", "late")  # adapters: on every block, and on the last alone
GREEDY = Sampling(temperature=0, top_p=1, max_own_tokens=6, max_calls=0, seed=0)
TEXTS = ("what is it", "12 and 7", "ab", "zzzz?", "", "hello there", "q", "to or from")
PROMPTS = [prompt_tokens(text, letters()) for text in TEXTS]


@pytest.fixture(params=sorted(KINDS))
def served(request, tmp_path: Path) -> Engine:
    """An engine whose router, behind the first of two blocks, chooses otherwise for each prompt."""
    make = partial(KINDS[request.param], blocks=2)
    model = make()
    bank = AdapterBank(model, 1 << 24)
    for number, name in enumerate(NAMES):
        bank.add(name, adapter_folder(make, tmp_path / name, number))
    late = bank.take(["late"])["late"].layers
    for layer in [name for name in late if ".0." in name]:
        del late[layer]
    assert late
    engine = Engine(model, letters(), half_weights=False, bank=bank, router=chooser(model))
    if request.param == "cached":
        engine._packed = None
    engine._ends = frozenset()  # random models end at random
    return engine


def chooser(model) -> Router:
    """A router that is sure of itself, and chooses differently among PROMPTS."""
    before, behind = request_edges(letters())
    spans = [(before, len(prompt) - behind) for prompt in PROMPTS]
    states = [pooled_states(model, [p], [s], [1])[0] for p, s in zip(PROMPTS, spans, strict=True)]
    torch.manual_seed(0)
    router = Router(RouterShape(NAMES, blocks=(1,), width=model.config.hidden_size, hidden=64))
    router.standardise(torch.stack(states))
    with torch.no_grad():
        router.outer.weight.mul_(200)
    return router


def log_probs(answers) -> Tensor:
    return torch.tensor([answer.log_probs for [answer] in answers])


def test_a_routed_prompt_is_answered_as_with_the_adapter_that_was_chosen(served: Engine) -> None:
    routed = served.answer(PROMPTS, 1, GREEDY, adapters="routed")
    chosen = [next(iter(answer.decision.weights), None) for [answer] in routed]
    assert set(chosen) == {*NAMES, None}
    alone = served.answer(PROMPTS, 1, GREEDY, adapters=chosen)
    plain = log_probs(served.answer(PROMPTS, 1, GREEDY))
    torch.testing.assert_close(log_probs(routed), log_probs(alone))
    for name, own, other in zip(chosen, log_probs(routed), plain, strict=True):
        assert torch.allclose(own, other, atol=1e-4) == (name is None)
    assert all(answer.decision is None for [answer] in alone)


def test_a_prompt_of_no_template_is_answered_too(served: Engine) -> None:
    [[answer]] = served.answer([[5]], 1, GREEDY, adapters="routed")
    assert len(answer.tokens) == GREEDY.max_own_tokens
    assert 0 <= answer.decision.confidence <= 1


def test_candidates_share_what_was_chosen_for_their_prompt(served: Engine) -> None:
    [group] = served.answer(PROMPTS[:1], 3, GREEDY, adapters="routed")
    assert len({id(answer.decision) for answer in group}) == 1
    torch.testing.assert_close(*(torch.tensor(group[n].log_probs) for n in (0, 2)))


def test_a_capability_whose_adapter_was_removed_is_left_to_the_model(served: Engine) -> None:
    before = served.answer(PROMPTS, 1, GREEDY, adapters="routed")
    wanted = next(name for [a] in before for name in a.decision.weights)
    served._bank.remove(wanted)
    after = served.answer(PROMPTS, 1, GREEDY, adapters="routed")
    plain = served.answer(PROMPTS, 1, GREEDY)
    hit = [n for n, [a] in enumerate(before) if wanted in a.decision.weights]
    assert hit
    for n in hit:
        assert after[n][0].decision == before[n][0].decision
        assert after[n][0].log_probs == plain[n][0].log_probs


def test_a_router_needs_a_bank_and_states_of_its_width() -> None:
    model = tiny_llama(blocks=2)
    with pytest.raises(ValueError, match="give one, too"):
        Engine(model, letters(), router=chooser(model))
    narrow = Router(RouterShape(NAMES, blocks=(1,), width=7, hidden=4))
    with pytest.raises(BadRouter, match="width 7"):
        Engine(model, letters(), bank=AdapterBank(model, 1 << 20), router=narrow)
    with pytest.raises(ValueError, match="no router"):
        Engine(model, letters()).answer(PROMPTS, 1, GREEDY, adapters="routed")
