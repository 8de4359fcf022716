"""Narrower students: the right parts stay, and refitting makes up for what went."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from modeling.blocks import dissect
from modeling.width import parts_of, widths_of
from registry.records import Keep
from stages.distill.least_squares import RULES, Moments, eliminate
from stages.distill.student import Stream, build_student, close_gaps, find_gaps
from stages.distill.width import (
    BlockFit,
    _behind_attention,
    choose_dimensions,
    narrow,
    norms_and_readers,
    without_dimensions,
)
from tests.stages.lessons import block_outputs, rows
from tests.tiny import tiny_llama

CALIBRATION, RIDGE = rows(8), 0.1
every_rule = pytest.mark.parametrize("rule", RULES)


def smaller(teacher, keep: Keep, dropped: list[int], rule: str = "elimination", ridge=RIDGE):
    """The student, and its fits."""
    sizes = widths_of(teacher).kept(keep)
    told: list[BlockFit] = []
    student, _, fits = narrow(
        teacher, dropped, sizes, CALIBRATION, ridge, 3, told.append, RULES[rule]
    )
    assert widths_of(student) == sizes and told == fits
    return student, fits


def error(teacher, student) -> float:
    """Squared distance of the states behind the last block, relative to the teacher's."""
    wanted, found = (block_outputs(m, CALIBRATION)[-1].double() for m in (teacher, student))
    return ((wanted - found).square().sum(-1) / wanted.square().sum(-1)).mean().item()


# --- least squares ---------------------------------------------------------------------------


def problem(tokens: int = 60, inputs: int = 9, outputs: int = 4, seed: int = 0):
    """Inputs of which several say the same, a layer, and what is missing of its outputs."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, inputs, generator=generator)
    a[:, 5] = a[:, 1] + 0.01 * a[:, 5]
    a[:, 8] = a[:, 2] + a[:, 3] + 0.01 * a[:, 8]
    weight = torch.randn(outputs, inputs, generator=generator)
    r = 0.3 * torch.randn(tokens, outputs, generator=generator)
    w = torch.rand(tokens, 1, generator=generator)
    return a, weight, r, w


def test_moments_of_a_layer_without_some_inputs_are_those_of_the_smaller_layer() -> None:
    a, weight, r, w = problem()
    kept, gone = torch.tensor([0, 2, 3, 7]), [1, 4, 5, 6, 8]
    found = Moments.none(nn.Linear(9, 4)).plus(a[:20], r[:20], w[:20]).plus(a[20:], r[20:], w[20:])
    found = found.without(weight, kept)
    missing = r + a[:, gone] @ weight[:, gone].T
    expected = Moments.none(nn.Linear(4, 4)).plus(a[:, kept], missing, w)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)
    assert found.total == pytest.approx(expected.total, rel=1e-5)


def left_over(a: Tensor, weight: Tensor, r: Tensor, w: Tensor, kept: list[int]) -> float:
    """What the best fit on some inputs alone leaves."""
    root, target = w.sqrt().double(), (r + a @ weight.T).double()
    solution = torch.linalg.lstsq(a[:, kept].double() * root, target * root).solution
    return ((target - a[:, kept].double() @ solution) * root).square().sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_elimination_finds_inputs_that_the_others_can_replace(seed: int) -> None:
    """Almost the best of all choices, where inputs that do the same would each look needed."""
    a, weight, r, w = problem(seed=seed)
    moments = Moments.none(nn.Linear(9, 4)).plus(a, r, w)
    each = torch.arange(9)[:, None]
    kept = eliminate(moments, weight, 1e-6, each, 7).tolist()
    best = min(left_over(a, weight, r, w, list(c)) for c in combinations(range(9), 7))
    assert left_over(a, weight, r, w, kept) == pytest.approx(best, rel=0.02)
    assert len({1, 5} & set(kept)) == 1 and len({2, 3, 8} & set(kept)) == 2


@every_rule
def test_a_rule_keeps_as_many_groups_as_asked_in_order(rule: str) -> None:
    a, weight, r, w = problem()
    moments = Moments.none(nn.Linear(9, 4)).plus(a, r, w)
    for keep in (1, 2, 3):
        kept = RULES[rule](moments, weight, RIDGE, torch.arange(9).view(3, 3), keep).tolist()
        assert len(kept) == keep and kept == sorted(set(kept)) and max(kept) < 3


@every_rule
def test_an_input_that_never_fires_is_the_first_to_go(rule: str) -> None:
    a, weight, r, w = problem()
    a[:, 4] = 0.0
    moments = Moments.none(nn.Linear(9, 4)).plus(a, r, w)
    kept = RULES[rule](moments, weight, RIDGE, torch.arange(9)[:, None], 8)
    assert 4 not in kept.tolist()


# --- blocks ----------------------------------------------------------------------------------

KEEPS = [Keep(ffn=0.5), Keep(heads=0.5), Keep(kv_heads=0.5), Keep(ffn=0.75, heads=0.5)]


@pytest.mark.parametrize("dropped", [[], [2], [2, 3], [1, 4]], ids=str)
@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_refitting_brings_a_narrower_student_nearer_to_its_teacher(
    keep: Keep, dropped: list[int]
) -> None:
    teacher = tiny_llama(blocks=6)
    refitted, fits = smaller(teacher, keep, dropped, "effect")
    bare, _ = smaller(teacher, keep, dropped, "effect", ridge=1e9)  # as good as no refit
    assert error(teacher, refitted) < error(teacher, bare)
    assert len(fits) == 6 - len(dropped)


@every_rule
def test_no_refit_ever_increases_the_error_on_calibration_rows(rule: str) -> None:
    _, fits = smaller(tiny_llama(blocks=6), Keep(ffn=0.5, kv_heads=0.5, hidden=0.875), [3], rule)
    for fit in fits:
        assert 0.0 <= fit.attention <= 1.0 and 0.0 <= fit.mlp <= 1.0


def test_the_share_explained_is_what_the_first_block_shows() -> None:
    """With the whole attention and no ridge to speak of there is nothing to explain before it."""
    teacher = tiny_llama(blocks=1)
    bare, _ = smaller(teacher, Keep(ffn=0.5), [], "effect", ridge=1e9)
    found, (fit,) = smaller(teacher, Keep(ffn=0.5), [], "effect")
    assert fit.mlp == pytest.approx(1 - error(teacher, found) / error(teacher, bare), abs=1e-3)


def test_a_whole_width_is_as_good_as_gap_closing_where_a_gap_is() -> None:
    """Behind the gap the teacher's state is wanted, by the same least squares."""
    teacher = tiny_llama(blocks=4)
    closed = build_student(teacher, [2])
    (explained,) = close_gaps(teacher, closed, find_gaps([2]), CALIBRATION, RIDGE, 3)
    sizes = replace(widths_of(teacher), ffn=63)  # all but one neuron
    _, _, fits = narrow(teacher, [2], sizes, CALIBRATION, RIDGE, 3, lambda _: None)
    assert fits[1].mlp == pytest.approx(explained, abs=0.05)


def test_a_neuron_without_any_effect_goes_and_nothing_changes() -> None:
    teacher = tiny_llama(blocks=2)
    for block, neuron in zip(dissect(teacher).blocks, (5, 60), strict=True):
        block.mlp.down_proj.weight.data[:, neuron] = 0.0
    sizes = replace(widths_of(teacher), ffn=63)
    student, _, _ = narrow(teacher, [], sizes, CALIBRATION, 1e9, 3, lambda _: None, RULES["effect"])
    with torch.no_grad():
        torch.testing.assert_close(
            student(CALIBRATION).logits, teacher(CALIBRATION).logits, atol=1e-4, rtol=1e-4
        )


@every_rule
def test_each_group_keeps_equally_many_heads(rule: str) -> None:
    _, fits = smaller(tiny_llama(blocks=3), Keep(heads=0.5), [], rule)
    for fit in fits:
        assert fit.kv_heads.tolist() == [0, 1]
        assert (fit.heads // 2).tolist() == [0, 1]


def test_a_block_that_adds_up_otherwise_is_refused() -> None:
    """As one that scales what it adds; its o_proj cannot be fitted to the state behind it."""
    teacher = tiny_llama(blocks=3)
    stream = Stream(teacher, teacher, CALIBRATION)
    stream.advance(1, 0)
    forward = teacher.model.layers[1].forward
    teacher.model.layers[1].forward = lambda *a, **k: 0.5 * forward(*a, **k)
    with pytest.raises(
        ValueError, match=r"LlamaDecoderLayer 1 is not its input plus.*\(100% apart"
    ):
        _behind_attention(stream, 1)


# --- hidden dimensions -----------------------------------------------------------------------


def test_dimensions_that_nobody_reads_go_first() -> None:
    teacher = tiny_llama(blocks=3)
    silent = [3, 11, 30]
    for _, layers in norms_and_readers(teacher):
        for layer in layers:
            layer.weight.data[:, silent] = 0.0
    kept = choose_dimensions(teacher, CALIBRATION.split(3), 29)
    assert kept.tolist() == [n for n in range(32) if n not in silent]
    by_norms = choose_dimensions(teacher, CALIBRATION.split(3), 29, weigh_readers=False)
    assert by_norms.tolist() != kept.tolist()


def test_a_norm_keeps_its_scale_when_dimensions_go() -> None:
    teacher = tiny_llama(blocks=3)
    hidden = torch.arange(24)
    student = without_dimensions(teacher, hidden, CALIBRATION.split(3))
    (first, _), *_ = norms_and_readers(teacher)
    (norm, _), *_ = norms_and_readers(student)
    embedded = teacher.get_input_embeddings()(CALIBRATION)
    wanted = first(embedded)[..., hidden].square().mean().sqrt()
    found = norm(embedded[..., hidden]).square().mean().sqrt()
    assert found.item() == pytest.approx(wanted.item(), rel=0.05)


def test_a_norm_of_another_kind_is_refused() -> None:
    teacher = tiny_llama(blocks=2)
    teacher.model.norm = nn.LayerNorm(32, bias=False)
    with pytest.raises(ValueError, match="LayerNorm is not x / rms.x."):
        norms_and_readers(teacher)


def test_every_width_and_depth_together_give_a_stock_model() -> None:
    keep = Keep(ffn=0.5, kv_heads=0.5, heads=0.5, hidden=0.75)
    student, fits = smaller(tiny_llama(blocks=5), keep, [1, 3])
    assert len(fits) == len(dissect(student).blocks) == 3
    parts = parts_of(dissect(student).blocks[0])
    assert parts.q_proj.weight.shape == (8, 24) and parts.down_proj.weight.shape == (24, 32)
    assert student.config.num_hidden_layers == 3
