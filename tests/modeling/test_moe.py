"""The mini mixture: it starts as nothing, all of it learns, and it comes back to the same bits."""

import copy
from pathlib import Path

import pytest
import torch

from modeling import moe
from modeling.fast_path import fast_path
from modeling.lora import AdapterShape, adapt, linear_layers, merged, trainable
from modeling.moe import (
    ExpertsShape,
    IdleExpert,
    TopOneExperts,
    add_experts,
    balance_loss,
    check_routing,
    find_experts,
    load_balance_loss,
    open_experts,
    remove_experts,
    save_experts,
)
from tests.tiny import tiny_llama, tiny_mamba

TOKENS = torch.arange(48).view(2, 24) * 5 % 97
SHAPE = ExpertsShape(after_block=2, experts=2, units=8, temperature=0.7, balance=0.01)
MAKERS = [tiny_mamba, tiny_llama]


def trained(model, shape: ExpertsShape = SHAPE):
    """A model with experts whose output is not zero any more."""
    experts = add_experts(model, shape, TOKENS, seed=0)
    generator = torch.Generator().manual_seed(1)
    experts.down.data = torch.randn(experts.down.shape, generator=generator)
    return model, experts


@pytest.mark.parametrize("make", MAKERS)
def test_new_experts_change_nothing(make) -> None:
    model = make()
    before = model(TOKENS).logits
    add_experts(model, SHAPE, TOKENS, seed=0)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("make", MAKERS)
def test_a_gradient_reaches_both_experts_and_the_router_at_once(make) -> None:
    model = make()
    experts = add_experts(model, SHAPE, TOKENS, seed=0)
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    (loss + balance_loss(model)).backward()
    check_routing(experts)
    assert all(gradient.any() for gradient in experts.down.grad)
    assert experts.router.grad.any()
    assert experts.router_bias.grad.any()


def test_once_the_output_is_not_zero_the_text_alone_teaches_all_of_it() -> None:
    model, experts = trained(tiny_mamba())
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for parameter in (experts.up, experts.down, experts.router):
        assert all(gradient.any() for gradient in parameter.grad)


def test_an_expert_that_no_token_goes_to_is_refused_by_name() -> None:
    model = tiny_mamba()
    experts = add_experts(model, SHAPE, TOKENS, seed=0)
    experts.router_bias.data[0] += 100
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    with pytest.raises(IdleExpert, match="reaches expert 1, the router of the mixture after bloc"):
        check_routing(experts)


def test_the_router_starts_out_even_though_states_have_much_in_common() -> None:
    model = tiny_mamba()
    for block in model.backbone.layers:
        block.mixer.out_proj.bias = None
    model.backbone.embeddings.weight.data += 3  # a large common part
    experts = add_experts(model, SHAPE, TOKENS, seed=0)
    seen = []
    experts.register_forward_hook(lambda _m, _i, _o: seen.append(experts._routed[1]))
    model(TOKENS, use_cache=False)
    assert 0.2 < seen[0].float().mean() < 0.8


def test_the_load_balance_loss_is_1_for_even_routing_and_more_for_any_other() -> None:
    even = torch.full((8, 2), 0.5)
    assert load_balance_loss(even, torch.arange(8) % 2) == 1
    sharp = torch.eye(2).repeat(4, 1)
    assert load_balance_loss(sharp, sharp.argmax(-1)) == 1
    one = torch.tensor([[0.9, 0.1]]).repeat(8, 1)
    torch.testing.assert_close(load_balance_loss(one, one.argmax(-1)), torch.tensor(1.8))
    assert load_balance_loss(torch.eye(4)[:1].repeat(8, 1), torch.zeros(8, dtype=torch.int64)) == 4


def test_following_the_load_balance_loss_evens_the_routing_out() -> None:
    experts = TopOneExperts(SHAPE, 16)
    experts.router_bias.data = torch.tensor([1.0, -1.0])
    hidden = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(experts.parameters(), 0.5)
    for _ in range(60):
        experts(hidden)
        loss = experts.load_balance()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.02


def test_padding_is_left_out_of_the_balance() -> None:
    experts = TopOneExperts(SHAPE, 16)
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([hidden, torch.zeros(2, 3, 16)], 1)
    experts(hidden)
    expected = experts.load_balance()
    experts(padded)
    real = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(experts.load_balance(real), expected)


def test_the_balance_is_read_once_after_a_pass_with_gradients() -> None:
    experts = TopOneExperts(SHAPE, 16)
    with torch.no_grad():
        experts(torch.ones(1, 3, 16))
    with pytest.raises(RuntimeError, match="there was none"):
        experts.load_balance()
    experts(torch.ones(1, 3, 16))
    experts.load_balance()
    with pytest.raises(RuntimeError, match="read once"):
        experts.load_balance()


def test_one_expert_alone_computes_a_token() -> None:
    model, experts = trained(tiny_mamba())
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    before = experts(hidden)
    chosen = experts._routed[1]
    assert 0 < chosen.sum() < len(chosen)
    experts.down.data[1] = float(
        "nan"
    )  # 0 x nan is nan: an expert that is weighted out still shows
    after = experts(hidden)[0]
    assert torch.equal(after[chosen == 0], before[0][chosen == 0])
    assert after[chosen == 1].isnan().all()


def test_a_token_gets_its_expert_times_the_routers_probability() -> None:
    _, experts = trained(tiny_mamba())
    token = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(3))
    x = (token / token.square().mean().sqrt()).flatten()
    p = torch.softmax((experts.router @ x + experts.router_bias) / 0.7, 0)
    e = p.argmax()
    expected = p[e] * (experts.down[e] @ (experts.up[e] @ x).relu())
    torch.testing.assert_close(experts(token).flatten(), expected)


def test_a_lower_temperature_decides_the_same_more_firmly() -> None:
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    firm, soft = (TopOneExperts(ExpertsShape(1, 2, 4, t, 0.01), 32) for t in (0.35, 0.7))
    firm.load_state_dict(soft.state_dict())
    firm, soft, x = firm.double(), soft.double(), x.double()
    (p, which), (q, same) = (one.probabilities(x).max(-1) for one in (firm, soft))
    assert torch.equal(which, same)
    assert (p > q).all()
    torch.testing.assert_close(torch.logit(p), 2 * torch.logit(q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_what_was_saved_opens_to_the_same_bits_on_a_stock_model(make, tmp_path: Path) -> None:
    model, experts = trained(make())
    save_experts(experts, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "experts.json",
        "experts.safetensors",
    ]
    stock = make()
    reopened = open_experts(stock, tmp_path)
    assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)
    assert reopened.shape == SHAPE
    assert not any(p.requires_grad for p in reopened.parameters())
    assert all(p.requires_grad for p in open_experts(make(), tmp_path, trains=True).parameters())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no mixture of experts \(experts.json"):
        open_experts(tiny_mamba(), tmp_path)
    model, experts = trained(tiny_mamba())
    save_experts(experts, tmp_path)
    with pytest.raises(ValueError, match="for a model of width 32; MambaForCausalLM has 16"):
        open_experts(tiny_mamba(width=16), tmp_path)
    with pytest.raises(ValueError, match="'after_block' is 2, but MambaForCausalLM has 1 blocks"):
        open_experts(tiny_mamba(blocks=1), tmp_path)
    with pytest.raises(ValueError, match="has a mixture of experts already"):
        open_experts(model, tmp_path)
    with pytest.raises(ValueError, match="'experts' of a mixture of experts is 1; it must be at"):
        ExpertsShape(1, 1, 8, 0.7, 0)
    with pytest.raises(ValueError, match="'temperature' is 0"):
        ExpertsShape(1, 2, 8, 0, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_decoding_with_a_cache_gives_what_the_whole_forward_gives(make) -> None:
    model, experts = trained(make())
    whole = model(TOKENS).logits
    assert (whole - make()(TOKENS).logits).abs().max() > 0.1
    first = model(TOKENS[:, :10], use_cache=True)
    kind = "cache_params" if make is tiny_mamba else "past_key_values"
    cache, pieces = getattr(first, kind), [first.logits]
    for place in range(10, TOKENS.shape[1]):
        step = model(TOKENS[:, place : place + 1], use_cache=True, **{kind: cache})
        pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_generate_runs_it_merged_with_an_adapter(make, tmp_path: Path) -> None:
    model = make()
    adapted = adapt(model, AdapterShape(2, 4.0, "lora"), 0, tmp_path)
    trained(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    with merged(adapted) as plain:
        answer = plain.generate(TOKENS[:1, :5], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        again = plain(answer[:, :-1]).logits[0, 4:].argmax(-1)
    assert torch.equal(answer[0, 5:], again)


def test_adapter_and_experts_are_trained_together_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_mamba()
    adapted = adapt(model, AdapterShape(2, 4.0, "lora", (), 2), 0, tmp_path)
    layers = linear_layers(model)
    add_experts(model, SHAPE, TOKENS, seed=0)
    names = [name for name, _ in trainable(adapted)]
    assert {name for name in names if ".lora_" not in name} == {
        f"base_model.model.backbone.layers.1.mini_moe.{part}"
        for part in ("router", "router_bias", "up", "down")
    }
    assert linear_layers(model) == layers
    assert find_experts(adapted) is find_experts(model)


def test_it_goes_with_the_fast_path_and_with_a_copy() -> None:
    model, experts = trained(tiny_mamba())
    before = model(TOKENS, use_cache=False).logits  # with gradients: what was routed is held
    with fast_path(model, print):
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, before)
    twin = copy.deepcopy(model)
    find_experts(twin).down.data.zero_()
    assert torch.equal(model(TOKENS, use_cache=False).logits, before)
    assert torch.equal(twin(TOKENS).logits, tiny_mamba()(TOKENS).logits)


def test_taken_off_the_model_is_stock_again() -> None:
    model, _ = trained(tiny_mamba())
    remove_experts(model)
    assert find_experts(model) is None
    assert torch.equal(model(TOKENS).logits, tiny_mamba()(TOKENS).logits)
    assert not any(moe.NAME in name for name in model.state_dict())
    remove_experts(model)


def test_in_bfloat16_the_branch_has_the_models_type_and_routes_in_float32() -> None:
    model = tiny_mamba().bfloat16()
    experts = add_experts(model, SHAPE, TOKENS, seed=0)
    assert {p.dtype for p in experts.parameters()} == {torch.bfloat16}
    hidden = torch.ones(1, 3, 32, dtype=torch.bfloat16)
    assert experts(hidden).dtype == torch.bfloat16
    assert experts._routed[0].dtype == torch.float32
