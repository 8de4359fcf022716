"""Building the student: the right blocks go, and what stands before a gap makes up for it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modeling.blocks import dissect
from stages.distill.student import (
    Gap,
    build_student,
    close_gaps,
    down_projection,
    find_gaps,
)
from tests.stages.lessons import block_outputs, rows
from tests.stages.lessons import teacher as bfloat16_llama
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

RIDGE, BATCH_ROWS = 0.1, 3
CALIBRATION = rows(8)


# --- closing ---------------------------------------------------------------------------------

GAPS = [[3], [5], [2, 3], [2, 4], [1, 3, 4], [2, 3, 5], [1, 2, 4], [2, 3, 4, 5]]


def shrunk(teacher: nn.Module, dropped: list[int], ridge: float = RIDGE):
    """The student with its gaps open, with its gaps closed, and the R^2 of each."""
    opened = build_student(teacher, dropped)
    closed = copy.deepcopy(opened)
    gaps = find_gaps(dropped)
    return opened, closed, list(close_gaps(teacher, closed, gaps, CALIBRATION, ridge, BATCH_ROWS))


def bridges(dropped: list[int]) -> dict[int, Gap]:
    """Each gap by the place of its bridge in the student."""
    gaps = find_gaps(dropped)
    return {gap.bridge - sum(other < gap.first for other in dropped): gap for gap in gaps}


def distances(teacher: nn.Module, student: nn.Module, bridge: int, gap: Gap) -> Tensor:
    """Squared distance of the states behind a gap, relative to the teacher's: one a token."""
    wanted = block_outputs(teacher, CALIBRATION)[gap.last].double()
    found = block_outputs(student, CALIBRATION)[bridge].double()
    return (wanted - found).square().sum(-1) / wanted.square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", GAPS, ids=str)
def test_the_refitted_student_is_closer_to_the_teacher_behind_every_gap(
    dropped: list[int], dtype: torch.dtype
) -> None:
    teacher = tiny_llama(blocks=6).to(dtype)
    opened, closed, explained = shrunk(teacher, dropped)
    for (bridge, gap), share in zip(bridges(dropped).items(), explained, strict=True):
        before = distances(teacher, opened, bridge, gap).sum()
        after = distances(teacher, closed, bridge, gap).sum()
        assert after < before
        assert 0.0 < share < 1.0


@pytest.mark.parametrize("dropped", GAPS, ids=str)
def test_the_share_explained_is_what_the_finished_student_shows(dropped: list[int]) -> None:
    """Each gap against the student whose gaps in front are closed and whose own is not."""
    teacher = tiny_llama(blocks=6)
    _, closed, explained = shrunk(teacher, dropped)
    student = build_student(teacher, dropped)
    blocks, finished = dissect(student).blocks, dissect(closed).blocks
    for (bridge, gap), share in zip(bridges(dropped).items(), explained, strict=True):
        before = distances(teacher, student, bridge, gap).sum()
        blocks[bridge].load_state_dict(finished[bridge].state_dict())
        after = distances(teacher, student, bridge, gap).sum()
        assert share == pytest.approx(1 - (after / before).item(), abs=2e-3)


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_the_refit_is_the_solution_of_its_least_squares(ridge: float) -> None:
    teacher = tiny_llama(blocks=4)
    opened, closed, _ = shrunk(teacher, [2], ridge)
    projection = dissect(opened).blocks[1].mlp.down_proj
    caught: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    found = block_outputs(opened, CALIBRATION)[1].flatten(0, 1).double()
    handle.remove()
    wanted = block_outputs(teacher, CALIBRATION)[2].flatten(0, 1).double()
    root = wanted.square().sum(-1, keepdim=True).rsqrt()  # of the weight of a token
    a, r = caught[0].flatten(0, 1).double() * root, (wanted - found) * root
    penalty = (ridge * a.square().sum(0)).sqrt().diag()
    stacked, target = torch.cat([a, penalty]), torch.cat([r, torch.zeros(a.shape[1], r.shape[1])])
    expected = torch.linalg.lstsq(stacked, target.double()).solution.T
    update = dissect(closed).blocks[1].mlp.down_proj.weight - projection.weight
    torch.testing.assert_close(update.double(), expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("dropped", GAPS, ids=str)
def test_only_the_down_projections_of_the_bridges_are_changed(dropped: list[int]) -> None:
    teacher = tiny_llama(blocks=6)
    whole = copy.deepcopy(teacher.state_dict())
    opened, closed, _ = shrunk(teacher, dropped)
    before, after = opened.state_dict(), closed.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in bridges(dropped)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in teacher.state_dict().items())


def test_the_size_of_a_batch_changes_nothing_that_matters() -> None:
    teacher = tiny_llama(blocks=6)
    students = []
    for batch_rows in (1, 8):
        students.append(build_student(teacher, [2, 4]))
        list(close_gaps(teacher, students[-1], find_gaps([2, 4]), CALIBRATION, RIDGE, batch_rows))
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)


def test_a_stronger_ridge_changes_less() -> None:
    teacher = tiny_llama(blocks=6)
    sizes = []
    for ridge in (0.01, 0.1, 1.0):
        opened, closed, _ = shrunk(teacher, [3], ridge)
        pair = [dissect(model).blocks[2].mlp.down_proj.weight for model in (opened, closed)]
        sizes.append((pair[1] - pair[0]).norm().item())
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_a_neuron_that_never_fires_does_not_keep_a_gap_from_being_closed() -> None:
    teacher = tiny_llama(blocks=4)
    teacher.model.layers[1].mlp.up_proj.weight[5] = 0.0
    opened, closed, explained = shrunk(teacher, [2])
    before, after = (dissect(model).blocks[1].mlp.down_proj.weight for model in (opened, closed))
    assert explained[0] > 0 and torch.isfinite(after).all()
    assert torch.equal(after[:, 5], before[:, 5])


# --- a stock model ---------------------------------------------------------------------------


def test_the_student_is_a_stock_model_that_opens_anywhere_with_the_same_logits(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    teacher = bfloat16_llama()
    _, student, _ = shrunk(teacher, [2, 3])
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 4
    assert "auto_map" not in config
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(stock) is type(student) is LlamaForCausalLM
    fresh = LlamaForCausalLM(stock.config).state_dict()
    assert {n: t.shape for n, t in student.state_dict().items()} == {
        n: t.shape for n, t in fresh.items()
    }
    with torch.no_grad():
        assert torch.equal(stock.eval()(CALIBRATION).logits, student(CALIBRATION).logits)


def test_the_student_decodes_with_its_cache_as_without() -> None:
    _, student, _ = shrunk(tiny_llama(blocks=6), [2, 3])
    prompt = CALIBRATION[:2, :5]
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    with_cache, without = (
        student.generate(prompt, attention_mask=mask, use_cache=use, **fixed)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mamba])
def test_a_block_without_the_one_matrix_is_refused_saying_so(build: Callable) -> None:
    with pytest.raises(ValueError, match="has 0 down-projections in its MLP .none."):
        down_projection(dissect(build()).blocks[0])


def test_a_block_with_several_is_refused_naming_them() -> None:
    block = nn.Module()
    block.mlp = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("first", "second")})
    with pytest.raises(ValueError, match="2 down-projections.*mlp.first, mlp.second"):
        down_projection(block)
