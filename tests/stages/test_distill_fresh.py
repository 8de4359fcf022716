"""New networks: built of any size, all of them learns, and they learn from anchors in depth."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.blocks import dissect
from registry.catalog import lookup
from registry.records import Shape, Student
from stages.distill.fresh import build_new, start_embedding
from stages.distill.objective import (
    AnchorMaps,
    Objective,
    Weights,
    pair_by_depth,
    trainable,
)
from stages.distill.params import Params
from stages.distill.training import Lesson, train
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.stages.lessons import ANCHORS, PREFIX, rows, subspaces_of, teacher, write_targets
from tests.stages.project import make_project
from tests.stages.tiny_dag import HARMS, PARAMS, StopAt

LLAMA = Student(
    "llama-tiny", "llama", None, None, Shape(16, 3, heads=2, kv_heads=1, ffn=24), "for tests"
)
MAMBA = Student("mamba-tiny", "mamba", None, None, Shape(16, 2, state=4), "for tests")
FULL = Weights(1.0, 0.2, 0.5, 1.0)
ROWS = rows(8)
both = pytest.mark.parametrize("entry", [LLAMA, MAMBA], ids=["llama", "mamba"])


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    return write_targets(tmp_path_factory.mktemp("targets"), teacher(), ROWS)


def beginner(entry: Student):
    """A new network, and the lift from its hidden state."""
    student = build_new(entry, teacher(), seed=0)
    return student, start_embedding(student, teacher())


def lesson(targets: TeacherTargets, lift: torch.Tensor, **changed) -> Lesson:
    params = Params(**{**PARAMS["distill"], "learning_rate": 1e-2, "batch_rows": 4, **changed})
    harms, subspaces = [*HARMS[:6]], subspaces_of(teacher(), ROWS)
    return Lesson(targets, subspaces, 0, None, harms, params, lift=lift)


# --- what is built ---------------------------------------------------------------------------


@both
def test_a_new_network_has_the_shape_of_its_entry_and_the_teachers_vocabulary(
    entry: Student,
) -> None:
    student, lift = beginner(entry)
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers) == (16, entry.shape.blocks)
    assert config.vocab_size == 97 and lift.shape == (32, 16)
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not student.training and not any(p.requires_grad for p in student.parameters())


@both
def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(entry: Student) -> None:
    torch.manual_seed(3)
    one = build_new(entry, teacher(), seed=1)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    other, third = build_new(entry, teacher(), seed=1), build_new(entry, teacher(), seed=2)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    pairs = zip(one.parameters(), third.parameters(), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


def test_a_vocabulary_smaller_than_the_teachers_is_refused() -> None:
    small = replace(LLAMA, shape=replace(LLAMA.shape, vocab=96))
    with pytest.raises(ValueError, match="'llama-tiny' has a vocabulary of 96, its teacher of 97"):
        build_new(small, teacher(), seed=0)
    larger = replace(LLAMA, shape=replace(LLAMA.shape, vocab=128))
    assert build_new(larger, teacher(), seed=0).config.vocab_size == 128


@pytest.mark.parametrize("hidden", [8, 16, 32, 40])
def test_the_lifted_embedding_is_the_nearest_of_its_width_to_the_teachers(hidden: int) -> None:
    model = teacher().float()
    student = build_new(replace(LLAMA, shape=replace(LLAMA.shape, hidden=hidden)), model, 0)
    fresh = student.get_input_embeddings().weight.std()
    lift = start_embedding(student, model)
    weight, source = (m.get_input_embeddings().weight for m in (student, model))
    source = source - source.mean(0)
    error = (weight @ lift.T - source).square().sum()
    smallest = torch.linalg.svdvals(source)[hidden:].square().sum()
    assert error.item() == pytest.approx(smallest.item(), rel=1e-3, abs=1e-3)
    assert weight.std().item() == pytest.approx(fresh.item(), rel=0.3)


@pytest.mark.parametrize("name", ["narrow-30", "narrow-27", "narrow-24", "llama-7m", "mamba-7m"])
def test_a_description_tells_the_true_number_of_parameters(name: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from modeling.width import Widths
    from stages.distill.fresh import CONFIGS

    smollm = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }  # fmt: skip
    entry = lookup("students", name)
    if entry.construction == "pruned":
        sizes = Widths(576, 9, 3, 64, 1536).kept(entry.keep)
        smollm |= {"intermediate_size": sizes.ffn, "num_hidden_layers": 30 - entry.drop_blocks}
        assert (sizes.hidden, sizes.heads) == (576, 9)
        config = LlamaConfig(**smollm)
    else:
        config = CONFIGS[entry.construction](entry, LlamaConfig(**smollm))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f" {count / 1e6:.1f} M parameters" in entry.description


# --- anchors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "count", "places"),
    [
        ((3, 5), 6, {3: 3, 5: 5}),  # as deep as the teacher
        ((3, 5), 3, {3: 1, 5: 2}),
        ((2, 5), 12, {2: 5, 5: 11}),
        ((0, 5), 2, {0: 0, 5: 1}),  # the first block at the least
        ((4, 5), 2, {4: 1}),  # both would be the last one; the more harmful stays
        ((), 3, {}),
    ],
)
def test_anchors_are_compared_with_the_block_that_is_as_deep(
    blocks: tuple[int, ...], count: int, places: dict[int, int]
) -> None:
    found = pair_by_depth(blocks, count, [9.0, 8.0, 7.0, 6.0, 3.0, 2.0])
    assert {anchor.block: anchor.student_block for anchor in found} == places
    assert sum(anchor.weight for anchor in found) == pytest.approx(1.0 if blocks else 0.0)


# --- learning --------------------------------------------------------------------------------


@both
def test_all_of_a_new_network_gets_its_true_gradient(
    entry: Student, targets: TeacherTargets
) -> None:
    """By numbers: the loss goes where the gradient says, embedding and head included."""
    student, lift = beginner(entry)
    taught = lesson(targets, lift)
    maps = AnchorMaps(taught.anchors(student), lift)
    named = taught.trained(student, maps)
    trained = {id(parameter) for _, parameter in named}
    assert trained == {id(p) for m in (student, maps) for p in m.parameters()}
    for _, parameter in named:
        parameter.requires_grad_(True)
    student.float()
    goal = Objective(student, 0, taught.anchors(student), maps, taught.subspaces, FULL)
    batch = targets.rows(torch.arange(4))
    assert batch.prefix is not None  # the teacher's own, and not to be used
    goal(batch).total.backward()
    for name, parameter in named:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    (embedding,) = [p for name, p in named if name == "embedding.weight"]
    step = 1e-3 * embedding.grad / embedding.grad.norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -2):
            embedding += sign * step
            losses.append(goal(batch).total.item())
    expected = 2e-3 * embedding.grad.norm().item()
    assert losses[0] - losses[1] == pytest.approx(expected, rel=0.05)


@both
def test_a_new_network_learns_what_its_teacher_says(
    entry: Student, targets: TeacherTargets, tmp_path: Path
) -> None:
    student, lift = beginner(entry)
    project = make_project(tmp_path / "project")
    train(student, lesson(targets, lift, steps=40), FULL, project.job(), "student")
    curve = project.curve()
    for name, share in (("kl", 0.8), ("anchor", 0.95)):
        first, last = (sum(step[name] for step in part) for part in (curve[:4], curve[-4:]))
        assert last < share * first, name
    assert not any(parameter.requires_grad for parameter in student.parameters())


@both
def test_a_new_network_that_was_stopped_ends_with_the_same_bits(
    entry: Student, targets: TeacherTargets, tmp_path: Path
) -> None:
    calm, stopped = (make_project(tmp_path / name) for name in ("calm", "stopped"))
    student, lift = beginner(entry)
    halted, again = copy.deepcopy(student), copy.deepcopy(student)
    taught = lesson(targets, lift, steps=5)
    train(student, taught, FULL, calm.job(), "student")
    stop = StopAt("student", 2)
    job = stopped.job(stop=stop)
    stop.watch(job)
    with pytest.raises(Stopped, match="step 2 of 5"):
        train(halted, taught, FULL, job, "student")
    train(again, taught, FULL, stopped.job(), "student")
    for (name, one), other in zip(student.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert stopped.curve() == calm.curve()


def test_a_network_of_its_own_embedding_learns_it_and_one_of_the_teachers_does_not() -> None:
    student, lift = beginner(LLAMA)
    maps = AnchorMaps([], lift)
    without = {name for name, _ in trainable(student, PREFIX, maps)}
    with_it = {name for name, _ in trainable(student, PREFIX, maps, vocabulary=True)}
    assert with_it - without == {"embedding.weight"}  # tied: once
    assert {name for name, _ in trainable(teacher(), PREFIX, maps, vocabulary=True)} >= {
        "embedding.weight", "head.weight",
    }  # fmt: skip
    assert len(ANCHORS) == 2
    assert len(dissect(student).blocks) == 3
