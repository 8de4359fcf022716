"""Answers: the top-k and the mass of all others, to float64's eye, in pieces or whole."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import modeling.answers
import modeling.weights
from modeling.answers import GROUP, ROWS, Answers, logits_of, read_answers
from modeling.blocks import find_units
from modeling.losses import TINY
from modeling.streaming import NotFinite, Passage
from modeling.weights import Resident
from tests.causal_lms import VOCABULARY, tiny_config, tiny_inputs, tiny_model
from tests.modeling.passages import Shapes, batches_of, exhaust, streaming

INFINITY = float("inf")
WIDTHS = (1, 2, GROUP - 1, GROUP, GROUP + 1, 5 * GROUP, 17 * GROUP - 1, 17 * GROUP, 17 * GROUP + 1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_right(found: Answers, logits: Tensor, k: int) -> None:
    """Compare with sorted float64 log-probabilities of the same logits (N, V).

    Where logits are equal, any of their tokens is right.
    """
    log_probs = logits.double().log_softmax(-1)
    targets = found.targets()
    assert targets.ids.shape == targets.log_probs.shape == (len(logits), k)
    assert targets.ids.dtype == torch.int64 and targets.log_probs.dtype == torch.float32
    best = log_probs.sort(-1, descending=True).values
    torch.testing.assert_close(targets.log_probs.double(), best[:, :k], atol=1e-5, rtol=1e-6)
    picked = log_probs.gather(-1, targets.ids)
    assert torch.equal(picked, best[:, :k])
    assert (targets.ids.sort(-1).values.diff(dim=-1) > 0).all(), "a token is there twice"
    tail = best[:, k:].exp().sum(-1).clamp_min(TINY)
    torch.testing.assert_close(targets.tail.double(), tail, atol=0, rtol=2e-5)


def pieces_of(logits: Tensor, sizes: list[int], k: int) -> Answers:
    """Answers from pieces of vocabulary of these sizes, joined."""
    first, found = 0, None
    for piece in logits.split(sizes, -1):
        here = Answers.of(piece, k, first)
        found = here if found is None else found.join(here, k)
        first += piece.shape[-1]
    return found


# --- logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ids_log_probs_and_tail_are_those_of_the_whole_distribution(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    logits = (4 * torch.randn(rows, width)).to(dtype)
    for k in {1, 2, 8, GROUP, width - 1, width} & set(range(1, width + 1)):
        assert_right(Answers.of(logits, k), logits, k)


@pytest.mark.parametrize("where", ["one group", "each its own", "the end", "the beginning"])
def test_the_highest_are_found_wherever_they_are(where: str) -> None:
    width, k = 50 * GROUP + 7, 16
    high = {
        "one group": torch.arange(k) + 3 * GROUP,
        "each its own": torch.arange(k) * 3 * GROUP + 5,
        "the end": torch.arange(width - k, width),
        "the beginning": torch.arange(k),
    }[where]
    logits = torch.randn(3, width)
    logits[:, high] = 20 + torch.rand(3, k)
    found = Answers.of(logits, k)
    assert_right(found, logits, k)
    assert torch.equal(found.ids.sort(-1).values, high.expand(3, -1))


def edge_cases(width: int) -> dict[str, Tensor]:
    some, one = torch.randn(4, width), torch.zeros(4, width)
    masked, rising = some.clone(), torch.arange(width).float().expand(4, -1).contiguous()
    masked[:, width // 3 :: 2] = -INFINITY
    one[:, 5] = 60.0
    return {
        "all equal, so that the tail is nearly all": torch.full((4, width), 3.25),
        "two values": (some > 0).float(),
        "only whole numbers": some.round(),
        "some impossible": masked,
        "whole pieces impossible": some.index_fill(1, torch.arange(1500), -INFINITY),
        "one certain": one,
        "two certain, the others at nothing": one + one.roll(70, -1),
        "huge": some * 1e30,
        "far below zero": some - 1e6,
        "far above zero": some + 1e4,
        "rising": rising,
        "falling": rising.flip(-1),
    }


@pytest.mark.parametrize("what", edge_cases(2048))
@pytest.mark.parametrize("sizes", [[2048], [1024, 1024], [700, 1300, 48], [2, 5, 2041]], ids=str)
def test_edge_cases(what: str, sizes: list[int]) -> None:
    logits = edge_cases(2048)[what]
    for k in (1, 8, 16):
        assert_right(pieces_of(logits, sizes, k), logits, k)


def test_all_but_the_kept_may_be_impossible() -> None:
    logits = torch.full((2, 500), -INFINITY)
    logits[:, [3, 77]] = torch.tensor([1.0, 2.0])
    targets = Answers.of(logits, 2).targets()
    assert targets.ids.tolist() == [[77, 3]] * 2
    assert torch.equal(targets.tail, torch.full((2,), TINY))


def test_a_tail_below_what_a_difference_of_one_would_show_is_exact() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, :2] = 21.0  # 998 tokens of e^-21 beside two: 3.8e-7
    (tail,) = Answers.of(logits, 2).targets().tail.tolist()
    assert tail == pytest.approx(998 / (2 * torch.tensor(21.0).double().exp().item()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_given_logits_are_not_changed(dtype: torch.dtype) -> None:
    for width in (50, 40 * GROUP):
        logits = torch.randn(ROWS + 3, width).to(dtype)
        before = logits.clone()
        answers = Answers.of(logits, 8, first_id=100)
        answers.join(Answers.of(logits, 8), 8)
        answers.targets()
        assert torch.equal(logits, before)


# --- pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_the_vocabulary_however_it_is_split_give_what_the_whole_does(seed: int) -> None:
    """Pieces narrower than k, of one token, at the beginning or the end."""
    chance, width = random.Random(seed), 40 * GROUP + 13
    logits = 5 * torch.randn(5, width)
    cuts = {1, 3, width - 2, *chance.sample(range(width), 6)} if seed % 2 else {width - 1}
    borders = [0, *sorted(cuts - {0}), width]
    sizes = [b - a for a, b in zip(borders, borders[1:], strict=False)]
    for k in (1, 7, 64, 300):
        found = pieces_of(logits, sizes, k)
        assert_right(found, logits, k)
        assert torch.equal(found.ids, Answers.of(logits, k).ids)


def test_answers_of_some_positions_are_put_together_in_order() -> None:
    logits = torch.randn(70, 300)
    parts = Answers.together([Answers.of(part, 5) for part in logits.split([1, 40, 29])])
    assert_right(parts, logits, 5)


# --- models ----------------------------------------------------------------------------------


class Masking(LlamaForCausalLM):
    """Names two tokens after the head, as models do that must not say some of them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., [1, 100]] = -INFINITY
        return output


def scaled(family: str, **options: Any) -> PreTrainedModel:
    config = tiny_config(family)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = type(tiny_model(family))(config).float().eval()
    for parameter in model.parameters():
        parameter.mul_(4)
    return model


def with_bias() -> PreTrainedModel:
    model = tiny_model("phi")
    model.lm_head.bias.copy_(torch.randn(VOCABULARY) * 3)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),  # the embedding is the head
    "a bias": with_bias,
    "scaled logits": lambda: scaled("granite", logits_scaling=8.0),
    "capped logits": lambda: scaled("gemma2", final_logit_softcapping=2.0),
    "logits in another type": lambda: tiny_model("mamba").bfloat16(),
    "named tokens": lambda: Masking(tiny_config("llama")).float().eval(),
    "no linear head": lambda: tiny_model("musicgen"),
}
SHAPES: Shapes = [(2, 9), (1, 4)]
PIECES = [64 << 20, 40 * VOCABULARY, 17 * VOCABULARY, 1]  # bytes: whole, several, one row each


def answers_in_pieces(passage: Passage, k: int, size: int, patch: pytest.MonkeyPatch) -> Answers:
    patch.setattr(modeling.weights, "PIECE_BYTES", size)
    exhaust(passage)
    return Answers.together(list(read_answers(passage, k)))


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("name", MODELS)
def test_answers_of_a_model_in_memory_are_those_of_its_own_logits(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    batches = batches_of(model, SHAPES)
    expected = torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches])
    for k in (1, 20, VOCABULARY):
        passage = Passage(model, find_units(model), Resident(model), batches)
        found = answers_in_pieces(passage, k, size, monkeypatch)
        assert_close(found, expected, k)


def assert_close(found: Answers, logits: Tensor, k: int) -> None:
    """As logits of pieces may differ in their last bit, compare with those found."""
    targets, log_probs = found.targets(), logits.double().log_softmax(-1)
    best = log_probs.sort(-1, descending=True).values
    exact = {"atol": 1e-4, "rtol": 1e-5}
    close = exact if logits.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(targets.log_probs.double(), best[:, :k], **close)
    picked = log_probs.gather(-1, targets.ids)
    torch.testing.assert_close(picked, best[:, :k], **close)
    assert (targets.ids.sort(-1).values.diff(dim=-1) > 0).all()
    tail = best[:, k:].exp().sum(-1).clamp_min(TINY)
    torch.testing.assert_close(targets.tail.double(), tail, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("name", MODELS)
def test_answers_of_a_model_on_disk_are_those_of_the_model_in_memory_to_the_bit(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = MODELS[name]().float()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    batches = batches_of(model, SHAPES)
    passage = Passage(model, find_units(model), Resident(model), batches)
    expected = answers_in_pieces(passage, 20, size, monkeypatch)
    with streaming(model, tmp_path, batches) as passage:
        found = answers_in_pieces(passage, 20, size, monkeypatch)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_some_positions_are_the_models_own(name: str) -> None:
    model = MODELS[name]()
    passage = Passage(model, find_units(model), Resident(model), batches_of(model, SHAPES))
    exhaust(passage)
    logits, picks = logits_of(passage), torch.tensor([7, 0, 3])
    whole = model(**passage.forwards[0].inputs).logits.flatten(0, 1)
    torch.testing.assert_close(logits(passage.forwards[0], picks).float(), whole[picks].float())


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_damaged_head_is_refused(name: str, value: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[name].view(-1)[:3] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with streaming(model, tmp_path, [tiny_inputs(model, 1, 5, seed=0)]) as passage:
        exhaust(passage)
        with pytest.raises(NotFinite, match="logits of LlamaForCausalLM are not finite.*its head"):
            list(read_answers(passage, 4))
