"""The loss of distillation: each term is its formula, and nothing else moves the student."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.blocks import dissect
from modeling.losses import SparseTargets, head_loss
from stages.distill.objective import (
    Anchor,
    AnchorMaps,
    Objective,
    Weights,
    place_anchors,
    trainable,
)
from stages.distill.student import build_student
from stages.formats.targets import Batch, TeacherTargets
from tests.stages.lessons import (
    ANCHORS,
    BLOCKS,
    PREFIX,
    block_outputs,
    rows,
    subspaces_of,
    teacher,
    write_targets,
)

HARMS = [9.0, 8.0, 4.0, 3.0, 2.0, 1.0]
ROWS = rows(8)
KD, CE = Weights(1.0, 0.0, 0.0, 1.0), Weights(0.0, 1.0, 0.0, 1.0)
SUBSPACES = subspaces_of(teacher(), ROWS)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    return write_targets(tmp_path_factory.mktemp("targets"), teacher(), ROWS)


@pytest.fixture
def batch(targets: TeacherTargets) -> Batch:
    return targets.rows(torch.arange(4))  # the first shard, computed as the teacher computed it


def objective(student, weights: Weights, dropped: list[int]) -> Objective:
    anchors = place_anchors(ANCHORS, dropped, HARMS)
    maps = AnchorMaps(anchors, student.config.hidden_size)
    for _, parameter in trainable(student, PREFIX, maps):
        parameter.requires_grad_(True)
    return Objective(student, PREFIX, anchors, maps, SUBSPACES, weights)


def gradients(student, weights: Weights, batch: Batch, dropped: list[int]) -> tuple:
    """The loss, and its gradient by everything that is trained, one long vector (but the maps)."""
    goal = objective(student, weights, dropped)
    loss = goal(batch)
    loss.total.backward()
    named = trainable(student, PREFIX, AnchorMaps([], 1))
    return loss, torch.cat([p.grad.float().flatten() for _, p in named])


def student_without(*dropped: int):
    return build_student(teacher(), list(dropped))


# --- where anchors are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "dropped", "places"),
    [
        ((3, 7), [], {3: 3, 7: 7}),
        ((3, 7), [5], {3: 3, 7: 6}),  # a kept block is in its new place
        ((5, 7), [4, 5], {5: 3, 7: 5}),  # the end of a gap is what its bridge gives
        ((4, 7), [4, 5], {7: 5}),  # the inside of a gap is nowhere
        ((7,), [6, 7], {7: 5}),  # a gap at the very end
        ((4, 5, 6), [4, 5, 6], {6: 3}),
        ((), [4], {}),
    ],
)
def test_anchors_are_found_where_the_student_has_their_output(
    blocks: tuple[int, ...], dropped: list[int], places: dict[int, int]
) -> None:
    found = place_anchors(blocks, dropped, [1.0] * 8)
    assert {anchor.block: anchor.student_block for anchor in found} == places


@pytest.mark.parametrize(("blocks", "dropped"), [((3,), [4]), ((3, 5), [4, 5]), ((2, 4), [3, 4])])
def test_a_bridge_stands_for_the_end_of_its_gap_and_not_for_itself(
    blocks: tuple[int, ...], dropped: list[int]
) -> None:
    """It was refitted to give what the gap gave; pulling it back to itself would undo that."""
    found = place_anchors(blocks, dropped, [1.0] * 8)
    assert [anchor.block for anchor in found] == [b for b in blocks if b == dropped[-1]]
    assert len({anchor.student_block for anchor in found}) == len(found)


def test_anchors_weigh_as_their_blocks_harm_and_one_in_all() -> None:
    found = place_anchors((3, 4, 5), [4], [9.0, 9.0, 9.0, 3.0, 2.0, 1.0])
    placed = [anchor.block for anchor in found]
    total = sum([9.0, 9.0, 9.0, 3.0, 2.0, 1.0][block] for block in placed)
    for anchor in found:
        assert anchor.weight == pytest.approx([9.0, 9.0, 9.0, 3.0, 2.0, 1.0][anchor.block] / total)
    assert sum(anchor.weight for anchor in found) == pytest.approx(1.0)


# --- the terms -------------------------------------------------------------------------------


def test_an_untouched_student_has_nothing_to_learn_from_its_teacher(batch: Batch) -> None:
    loss, gradient = gradients(teacher(), KD, batch, [])
    other, far = gradients(student_without(4), KD, batch, [4])
    assert abs(loss.kl) < 1e-3 < 0.02 < other.kl
    assert gradient.norm() < 0.02 * far.norm()


def test_an_untouched_student_is_at_its_anchors(batch: Batch) -> None:
    loss, _ = gradients(teacher(), Weights(1.0, 0.0, 1.0, 1.0), batch, [])
    other, _ = gradients(student_without(4), Weights(1.0, 0.0, 1.0, 1.0), batch, [4])
    assert loss.anchor < 1e-3 < 0.02 < other.anchor


def full_forward(student, batch: Batch, weights: Weights) -> tuple[Tensor, float, float]:
    """The loss by the model's own forward from the tokens on."""
    states: list[Tensor] = []
    norm = dissect(student).norm
    handle = norm.register_forward_hook(lambda _, inputs, output: states.append(output))
    student(batch.tokens, use_cache=False)
    handle.remove()
    labels, answers = batch.next_token()
    hidden = states[0][:, :-1].flatten(0, 1)
    head = student.get_output_embeddings().weight
    return head_loss(hidden, head, labels, answers, weights.kd, weights.ce, weights.temperature)


@pytest.mark.parametrize("weights", [KD, CE, Weights(0.7, 0.3, 0.0, 2.0)])
def test_without_anchors_the_loss_is_plain_distillation_of_the_whole_model(
    batch: Batch, weights: Weights
) -> None:
    student = student_without(4)
    loss, gradient = gradients(student, weights, batch, [4])
    student.zero_grad()
    expected, kl, ce = full_forward(student, batch, weights)
    expected.backward()
    plain = torch.cat(
        [p.grad.float().flatten() for _, p in trainable(student, PREFIX, AnchorMaps([], 1))]
    )
    assert (loss.total.item(), loss.kl, loss.ce) == (expected.item(), kl, ce)
    assert loss.anchor == 0.0
    torch.testing.assert_close(gradient, plain, atol=1e-3 * plain.norm().item(), rtol=0)


def test_an_anchor_weight_of_zero_is_to_the_bit_the_same_as_no_anchor(batch: Batch) -> None:
    with_anchors = objective(student_without(4), Weights(1.0, 0.2, 0.0, 1.0), [4])
    without = objective(student_without(4), Weights(1.0, 0.2, 0.0, 1.0), [4])
    without.anchors = []
    for goal in (with_anchors, without):
        goal(batch).total.backward()
    pairs = zip(with_anchors.student.parameters(), without.student.parameters(), strict=True)
    for one, other in pairs:
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    assert all(parameter.grad is None for parameter in with_anchors.maps.parameters())


def test_the_terms_add_up_with_their_weights(batch: Batch) -> None:
    student = student_without(4)
    loss, _ = gradients(student, Weights(0.7, 0.3, 0.5, 1.0), batch, [4])
    assert loss.total.item() == pytest.approx(0.7 * loss.kl + 0.3 * loss.ce + 0.5 * loss.anchor)


def test_the_anchor_term_is_the_relative_error_in_each_subspace(batch: Batch) -> None:
    student, dropped = student_without(4), [4]
    goal = objective(student, Weights(1.0, 0.0, 1.0, 1.0), dropped)
    width = student.config.hidden_size
    with torch.no_grad():
        for number, matrix in enumerate(goal.maps.parameters()):
            torch.manual_seed(number)
            matrix += 0.1 * torch.randn(width, width)
    found = goal(batch)
    outputs, expected = block_outputs(student, batch.tokens), 0.0
    for anchor in place_anchors(ANCHORS, dropped, HARMS):
        matrix = goal.maps.maps[str(anchor.block)].double()
        mapped = outputs[anchor.student_block].double() @ matrix.T
        basis = SUBSPACES.basis[anchor.block].double()
        scale = SUBSPACES.variance[anchor.block, : basis.shape[1]].double().sqrt()
        coordinates = (mapped - SUBSPACES.mean[anchor.block].double()) @ basis / scale
        error = (coordinates - batch.anchors[anchor.block].double()).square().mean().item()
        expected += anchor.weight * error
    assert found.anchor == pytest.approx(expected, rel=1e-3)


def test_a_map_starts_as_the_identity() -> None:
    hidden = torch.randn(2, 3, 8).bfloat16()
    assert torch.equal(AnchorMaps([Anchor(3, 3, 1.0)], 8)(3, hidden), hidden.float())


def test_the_text_alone_teaches_nothing_about_the_teacher(batch: Batch) -> None:
    """The control would be no control if anything of the teacher's answers reached it."""
    other = copy.copy(vars(batch))
    answers = batch.targets
    other["targets"] = SparseTargets(
        (answers.ids + 11).remainder(97), answers.log_probs.flip(0) - 1.0,
        torch.full_like(answers.tail, 0.5),
    )  # fmt: skip
    other["anchors"] = {block: -kept for block, kept in batch.anchors.items()}
    _, one = gradients(student_without(4), CE, batch, [4])
    _, two = gradients(student_without(4), CE, Batch(**other), [4])
    torch.testing.assert_close(one, two, atol=1e-4 * one.norm().item(), rtol=0)


def test_recomputed_blocks_give_the_same_loss_and_gradients_to_the_bit(batch: Batch) -> None:
    found = []
    for recompute in (False, True):
        student = build_student(teacher().float(), [4])
        goal = objective(student, Weights(1.0, 0.2, 0.5, 1.0), [4])
        goal = Objective(
            student, PREFIX, goal.anchors, goal.maps, SUBSPACES, goal.weights, recompute
        )
        loss = goal(batch)
        loss.total.backward()
        named = trainable(student, PREFIX, goal.maps)
        found.append((loss.total.detach(), {name: p.grad for name, p in named}))
    (plain, expected), (recomputed, gradients) = found
    assert torch.equal(plain, recomputed)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_recomputing_keeps_only_the_inputs_of_blocks(batch: Batch) -> None:
    kept = []
    for recompute in (False, True):
        student = build_student(teacher().float(), [4])
        goal = objective(student, KD, [4])
        goal = Objective(student, PREFIX, [], goal.maps, SUBSPACES, KD, recompute)
        elements = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            goal(batch)
        kept.append(elements)
    assert kept[1] < 0.5 * kept[0]


def test_rows_of_another_length_are_taken_as_they_come(tmp_path: Path, batch: Batch) -> None:
    student = student_without(4)
    goal = objective(student, KD, [4])
    short = write_targets(tmp_path, teacher(), rows(4, tokens=9)).rows(torch.arange(4))
    first = goal(batch).kl
    assert goal(short).kl == pytest.approx(full_forward(student, short, KD)[1], abs=1e-4)
    assert goal(batch).kl == first


# --- what is trained -------------------------------------------------------------------------


def test_everything_behind_the_prefix_is_trained_but_not_the_head() -> None:
    student = student_without(4)
    maps = AnchorMaps(place_anchors(ANCHORS, [4], HARMS), student.config.hidden_size)
    chosen = {id(parameter) for _, parameter in trainable(student, PREFIX, maps)}
    names = {name for name, p in student.named_parameters() if id(p) in chosen}
    behind = tuple(f"model.layers.{n}." for n in range(PREFIX, BLOCKS - 1))
    assert names == {
        name for name, _ in student.named_parameters() if name.startswith((*behind, "model.norm."))
    }
    assert chosen > {id(parameter) for parameter in maps.parameters()} != set()


def test_every_trained_parameter_gets_a_gradient(batch: Batch) -> None:
    goal = objective(student_without(4), Weights(1.0, 0.2, 0.5, 1.0), [4])
    goal(batch).total.backward()
    for name, parameter in trainable(goal.student, PREFIX, goal.maps):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    frozen = [goal.student.get_input_embeddings().weight, goal.anatomy.head.weight]
    assert all(parameter.grad is None for parameter in frozen)
