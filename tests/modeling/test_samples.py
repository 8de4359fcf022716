"""Samples: draws are the model's own distribution, decided by seed and position alone."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modeling.answers
import modeling.weights
from modeling.answers import GROUP, ROWS
from modeling.blocks import find_units
from modeling.samples import Samples, draw_keys, last_point, read_samples
from modeling.streaming import NotFinite, Passage
from modeling.weights import Resident
from tests.causal_lms import tiny_inputs, tiny_model
from tests.modeling.passages import Shapes, batches_of, exhaust, saved, streaming
from tests.modeling.test_answers import MODELS

INFINITY = float("inf")
WIDTH = 3 * GROUP + 7
SPLITS = [[WIDTH], [1, WIDTH - 1], [WIDTH - 1, 1], [GROUP, GROUP, GROUP + 7], [2, 5, 90, 102]]


def drawn(logits: Tensor, draws: int, seed: int = 0, first: int = 0, sizes=None) -> Samples:
    """Draws from logits (N, V) that come in pieces of these sizes."""
    keys = draw_keys(seed, torch.arange(first, first + len(logits)), draws)
    found, first_id = Samples.none_yet(keys), 0
    for piece in logits.split(sizes or [logits.shape[-1]], -1):
        found = found.see(piece, keys, first_id)
        first_id += piece.shape[-1]
    return found


def z_scores(ids: Tensor, p: Tensor) -> Tensor:
    """How many standard deviations each token's count is off, of ids (any) drawn from p (V,)."""
    counts = torch.bincount(ids.flatten(), minlength=len(p)).double()
    return (counts - ids.numel() * p) / (ids.numel() * p * (1 - p)).sqrt().clamp_min(1e-9)


# --- the distribution ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SPLITS[0], SPLITS[-1]], ids=str)
def test_over_many_seeds_the_draws_are_the_distribution(sizes: list[int]) -> None:
    logits = torch.randn(40, WIDTH) * 2
    p = logits.double().softmax(-1)
    total = torch.zeros(40, WIDTH, dtype=torch.float64)
    seeds, draws = 40, 50
    for seed in range(seeds):
        ids = drawn(logits, draws, seed, sizes=sizes).ids
        total += torch.stack([torch.bincount(row, minlength=WIDTH) for row in ids])
    expected = seeds * draws * p
    chi = ((total - expected).square() / expected).sum()
    freedom = 40 * (WIDTH - 1)
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom + (1 / p).sum() / (seeds * draws))


def test_the_mean_over_positions_is_the_distribution_to_a_thousandth() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -INFINITY, 1.0])
    ids = drawn(logits.expand(4000, -1), 100).ids
    assert z_scores(ids, logits.double().softmax(-1)).abs().max() < 4.5
    share = torch.bincount(ids.flatten(), minlength=6) / ids.numel()
    torch.testing.assert_close(share, logits.softmax(-1), atol=3e-3, rtol=0)


@pytest.mark.parametrize("what", ["two draws", "two positions", "two seeds"])
def test_draws_know_nothing_of_each_other(what: str) -> None:
    logits = torch.tensor([1.0, 0.0, -0.5, 0.3])
    p = logits.double().softmax(-1)
    ids = drawn(logits.expand(20_000, -1), 2).ids
    other = {
        "two draws": ids[:, 1], "two positions": ids[:, 0].roll(1),
        "two seeds": drawn(logits.expand(20_000, -1), 2, seed=1).ids[:, 0],
    }[what]  # fmt: skip
    pairs = ids[:, 0] * 4 + other
    assert z_scores(pairs, (p[:, None] * p).flatten()).abs().max() < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_mass_and_the_draws_own_weights_are_kept(dtype: torch.dtype) -> None:
    logits = (torch.randn(ROWS + 5, WIDTH) * 4).to(dtype)
    for sizes in SPLITS:
        found = drawn(logits, 9, sizes=sizes)
        log_probs = logits.double().log_softmax(-1)
        torch.testing.assert_close(found.log_mass, logits.double().logsumexp(-1), rtol=0, atol=1e-6)
        mean = log_probs.gather(-1, found.ids).mean(-1)
        torch.testing.assert_close(found.mean_log_prob(), mean, rtol=0, atol=1e-6)


def test_minus_the_mean_log_probability_is_the_entropy_on_average() -> None:
    logits = torch.randn(1, WIDTH) * 2
    log_p = logits.double().log_softmax(-1)[0]
    found = -drawn(logits.expand(2000, -1), 40).mean_log_prob()
    spread = found.std() / math.sqrt(2000)
    assert abs(found.mean() + (log_p.exp() * log_p).sum()) < 4.5 * spread < 0.05


def edge_cases() -> dict[str, Tensor]:
    some, one = torch.randn(6, WIDTH), torch.zeros(6, WIDTH)
    one[:, 70] = 90.0
    return {
        "half impossible": some.index_fill(1, torch.arange(0, WIDTH, 2), -INFINITY),
        "the first piece impossible": some.index_fill(1, torch.arange(100), -INFINITY),
        "the last piece impossible": some.index_fill(1, torch.arange(100, WIDTH), -INFINITY),
        "only one possible": torch.full((6, WIDTH), -INFINITY).index_fill(1, torch.tensor(5), 3.0),
        "one certain": one,
        "huge": some * 1e30,
        "far below zero": some - 1e6,
        "far above zero": some + 1e4,
        "all equal": torch.full((6, WIDTH), -2.5),
    }


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("what", edge_cases())
def test_edge_cases(what: str, sizes: list[int]) -> None:
    logits = edge_cases()[what]
    found = drawn(logits, 30, sizes=sizes)
    log_probs = logits.double().log_softmax(-1)
    assert (log_probs.gather(-1, found.ids) > -40).all(), "a token was drawn that cannot come"
    assert torch.equal(logits.gather(-1, found.ids).double(), found.log_weights)
    if what in ("only one possible", "one certain", "huge"):
        assert torch.equal(found.ids, log_probs.argmax(-1, keepdim=True).expand(-1, 30))


# --- what decides a draw ---------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SPLITS[1:], ids=str)
def test_pieces_of_the_vocabulary_do_not_change_a_draw(sizes: list[int]) -> None:
    logits = torch.randn(200, WIDTH) * 3
    assert torch.equal(drawn(logits, 64, sizes=sizes).ids, drawn(logits, 64).ids)


@pytest.mark.parametrize("count", [1, 7, ROWS, ROWS + 1])
def test_the_positions_that_go_together_do_not_change_a_draw(count: int) -> None:
    logits = torch.randn(80, WIDTH) * 3
    starts = range(0, 80, count)
    parts = [drawn(logits[n : n + count], 20, first=1000 + n) for n in starts]
    assert torch.equal(Samples.together(parts).ids, drawn(logits, 20, first=1000).ids)


def test_fewer_draws_are_the_first_of_more() -> None:
    logits = torch.randn(30, WIDTH)
    assert torch.equal(drawn(logits, 5).ids, drawn(logits, 64).ids[:, :5])


def test_seed_and_position_change_the_draws() -> None:
    logits = torch.zeros(50, WIDTH)
    ids = drawn(logits, 20).ids
    for other in (drawn(logits, 20, seed=1).ids, drawn(logits, 20, first=50).ids, ids.roll(1, 0)):
        assert (ids == other).double().mean() < 0.03  # 1 in WIDTH by chance
    torch.manual_seed(5)  # whatever else draws random numbers
    assert torch.equal(drawn(logits, 20).ids, ids)


def test_the_given_logits_are_not_changed() -> None:
    logits = torch.randn(ROWS + 3, WIDTH)
    before = logits.clone()
    drawn(logits, 8, sizes=[100, WIDTH - 100])
    assert torch.equal(logits, before)


# --- the process -----------------------------------------------------------------------------


def points(low: float, high: float, count: int = 40_000) -> Tensor:
    keys = draw_keys(3, torch.arange(count), 1)
    bounds = [torch.full((count,), bound, dtype=torch.float64) for bound in (low, high)]
    return last_point(keys, *bounds)[:, 0]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.9, 1.1), (-3.6, -1.2), (-7.0, 5.0)])
def test_an_interval_is_empty_as_often_as_a_poisson_process_leaves_it(
    low: float, high: float
) -> None:
    share, expected = (points(low, high) == -INFINITY).double().mean(), math.exp(low - high)
    assert abs(share - expected) < 4.5 * math.sqrt(max(expected * (1 - expected), 1e-9) / 40_000)


def test_the_last_point_is_the_same_from_wherever_it_is_looked_for() -> None:
    whole = points(-INFINITY, 2.3)
    assert torch.isfinite(whole).all() and (whole <= 2.3).all()
    for low in (-4.0, -1.5, 0.0, 2.0):
        assert torch.equal(points(low, 2.3), torch.where(whole > low, whole, -INFINITY))
    in_two = torch.maximum(points(-INFINITY, 0.7), points(0.7, 2.3))
    assert torch.equal(in_two, whole)
    distance = 2.3 - whole
    assert abs(distance.mean() - 1) < 0.03 and abs(distance.std() - 1) < 0.04  # exponential


# --- counting --------------------------------------------------------------------------------


def test_counts_are_those_of_each_position() -> None:
    ids = torch.tensor([[4, 1, 4, 4], [2, 2, 2, 2], [9, 8, 7, 6]])
    nothing = torch.zeros(3, dtype=torch.float64)
    found, counts, distinct = Samples(ids, ids.double(), nothing).counted()
    assert found.tolist() == [1, 4, 2, 6, 7, 8, 9]
    assert counts.tolist() == [1, 3, 4, 1, 1, 1, 1]
    assert distinct.tolist() == [2, 1, 4]


# --- models ----------------------------------------------------------------------------------

SHAPES: Shapes = [(2, 9), (1, 4)]


def samples_of(passage: Passage, draws: int = 12, seed: int = 0, first: int = 0) -> Samples:
    exhaust(passage)
    return Samples.together(list(read_samples(passage, draws, seed, first)))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name != "no linear head"])
def test_draws_of_a_model_are_those_of_its_own_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    batches = batches_of(model, SHAPES)
    logits = torch.cat([model(**batch).logits.flatten(0, 1) for batch in batches])
    expected = drawn(logits, 50, first=77)
    monkeypatch.setattr(modeling.answers, "TOKENS", 5)
    for size in (64 << 20, 17 * 128):
        monkeypatch.setattr(modeling.weights, "PIECE_BYTES", size)
        passage = Passage(model, find_units(model), Resident(model), batches)
        found = samples_of(passage, 50, first=77)
        same = (found.ids == expected.ids).double().mean()
        assert same > (0.999 if logits.dtype == torch.float32 else 0.98)  # but for their rounding


@torch.no_grad()
@pytest.mark.parametrize("size", [64 << 20, 40 * 128])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "musicgen"])
def test_draws_of_a_model_on_disk_are_those_of_the_model_in_memory(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(modeling.weights, "PIECE_BYTES", size)
    model = saved(family, tmp_path)
    batches = batches_of(model, SHAPES)
    expected = samples_of(Passage(model, find_units(model), Resident(model), batches))
    with streaming(model, tmp_path, batches) as passage:
        found = samples_of(passage)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_damaged_head_is_refused(value: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"].view(-1)[:3] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        streaming(model, tmp_path, [tiny_inputs(model, 1, 5, seed=0)]) as passage,
        pytest.raises(NotFinite, match="logits of LlamaForCausalLM are not finite.*its head"),
    ):
        samples_of(passage)
