"""Extract: what is kept of a teacher is what its own forward gives, and damage is seen."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import modeling.answers
from stages.extract.anchors import choose_anchors
from stages.extract.stage import Params
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.stages.lessons import (
    ANCHORS,
    PREFIX,
    TOP_K,
    answers,
    block_outputs,
    read_answers,
    rows,
    subspaces_of,
    teacher,
)
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag, make_tiny_dag
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

DTYPES = [torch.float32, torch.bfloat16]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@torch.no_grad()
def log_probs_of(model, tokens: Tensor) -> Tensor:
    """The whole distribution at every position by the model's own forward: (B, T, V) float64."""
    return model(tokens, use_cache=False).logits.double().log_softmax(-1)


# --- answers ---------------------------------------------------------------------------------


@every_dtype
def test_the_top_k_and_the_tail_are_those_of_a_whole_forward(dtype: torch.dtype) -> None:
    model, tokens = teacher().to(dtype), rows(3)
    found = answers(model, tokens, subspaces_of(model, tokens))
    expected = log_probs_of(model, tokens)
    top, ids = expected.topk(TOP_K, -1)
    close = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(found["log_probs"].double(), top, **close)
    if dtype == torch.float32:  # logits in bfloat16 are often equal, and then any order is right
        assert torch.equal(found["ids"].long(), ids)
    assert (found["ids"].long().sort(-1).values.diff(dim=-1) > 0).all()  # none is there twice
    at_ids = expected.gather(-1, found["ids"].long())
    torch.testing.assert_close(found["log_probs"].double(), at_ids, **close)
    others = expected.scatter(-1, found["ids"].long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found["tail"].double(), others, **close)


@every_dtype
def test_kept_mass_and_tail_are_the_whole_distribution(dtype: torch.dtype) -> None:
    model, tokens = teacher().to(dtype), rows(3)
    found = answers(model, tokens, subspaces_of(model, tokens))
    mass = found["log_probs"].double().exp().sum(-1) + found["tail"].double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=2e-3, rtol=0)


@every_dtype
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_the_prefix_is_the_output_of_the_block_before(build: Callable, dtype: torch.dtype) -> None:
    model, tokens = build(blocks=4).to(dtype), rows(2)
    subspaces = subspaces_of(model, tokens)
    outputs = block_outputs(model, tokens)
    for prefix in (1, 2, 3):
        found = read_answers(model, tokens, TOP_K, prefix, (3,), subspaces)
        assert torch.equal(found["prefix"], outputs[prefix - 1].bfloat16())


def test_without_a_prefix_no_state_is_kept() -> None:
    model, tokens = teacher(), rows(2)
    found = read_answers(model, tokens, TOP_K, 0, (3,), subspaces_of(model, tokens))
    assert set(found) == {"tokens", "ids", "log_probs", "tail", "anchor.3"}


@every_dtype
def test_anchors_are_whitened_coordinates_of_their_blocks_outputs(dtype: torch.dtype) -> None:
    model, tokens = teacher().to(dtype), rows(6)
    subspaces = subspaces_of(model, tokens)
    found = answers(model, tokens, subspaces)
    outputs = block_outputs(model, tokens)
    assert {key for key in found if key.startswith("anchor.")} == {f"anchor.{b}" for b in ANCHORS}
    for block in ANCHORS:
        centred = outputs[block].double() - subspaces.mean[block].double()
        basis = subspaces.basis[block].double()
        scale = subspaces.variance[block, : basis.shape[1]].double().sqrt()
        torch.testing.assert_close(
            found[f"anchor.{block}"].double(), centred @ basis / scale, atol=0.02, rtol=0.02
        )
        assert found[f"anchor.{block}"].float().var() == pytest.approx(1.0, abs=0.1)


def test_a_row_does_not_see_its_neighbours() -> None:
    model, tokens = teacher().float(), rows(5)
    subspaces = subspaces_of(model, tokens)
    together = answers(model, tokens, subspaces)
    for number, row in enumerate(tokens):
        alone = answers(model, row[None], subspaces)
        for key, tensor in together.items():
            torch.testing.assert_close(alone[key][0], tensor[number], atol=0.02, rtol=0.02)


def test_the_size_of_a_chunk_of_logits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = teacher().float(), rows(3)
    subspaces = subspaces_of(model, tokens)
    whole = answers(model, tokens, subspaces)
    assert modeling.answers.TOKENS > tokens.numel()
    monkeypatch.setattr(modeling.answers, "TOKENS", 7)
    for key, tensor in answers(model, tokens, subspaces).items():
        torch.testing.assert_close(tensor, whole[key], atol=2e-3, rtol=2e-3)


def test_all_tokens_may_be_kept() -> None:
    model, tokens = teacher(), rows(2)
    subspaces = subspaces_of(model, tokens)
    found = read_answers(model, tokens, 97, PREFIX, ANCHORS, subspaces)
    assert found["ids"].shape == (2, 16, 97)
    assert torch.isfinite(found["tail"].float()).all() and (found["tail"].float() < -14).all()


# --- the stage -------------------------------------------------------------------------------

GOOD = {
    "answers": "top_k", "top_k": 8, "samples": 8, "prefix_depth": 0.333,
    "anchors": 2, "batch_rows": 2, "shard_rows": 4, "engine": "auto", "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shard_rows": 5}, "'shard_rows' .5. must be a multiple of 'batch_rows' .2."),
        ({"anchors": -1}, "'anchors' is -1"),
        ({"prefix_depth": 1.0}, "'prefix_depth' is 1.0"),
        ({"top_k": 0}, "'top_k' is 0"),
        ({"samples": 0}, "'samples' is 0; it must lie between 1 and 65535"),
        ({"samples": 65_536}, "'samples' is 65536"),
        ({"answers": "drawn"}, "'answers' is 'drawn'; it must be one of top_k, sampled"),
        ({"engine": "fast"}, "'engine' is 'fast'; it must be one of auto, resident"),
        (
            {"engine": "vllm"},
            "'engine' is 'vllm'.*'prefix_depth' to 0.0, 'anchors' to 0 and",
        ),
    ],
)
def test_contradictions_are_refused(changed: dict, message: str) -> None:
    Params(**GOOD)
    with pytest.raises(ValueError, match=message):
        Params(**{**GOOD, **changed})


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    return make_tiny_dag(tmp_path, monkeypatch)


def test_the_stage_keeps_every_training_row_once(dag: TinyDag) -> None:
    metrics = dag.run("extract")
    targets = TeacherTargets(dag.root / "artifacts/extract" / TEACHER)
    header = targets.header
    assert (header.teacher, header.prefix_blocks, header.anchors) == (TEACHER, 3, (3, 4, 7))
    found = targets.rows(torch.arange(header.rows)).tokens
    assert sorted(found.tolist()) == sorted(rows(10, start=len("train")).tolist())
    assert metrics["tokens"] == found.numel()
    tail = targets.rows(torch.arange(10)).targets.tail.mean().item()
    assert metrics["top_k_mass"] == pytest.approx(1 - tail, abs=1e-4)


def test_streamed_from_disk_the_same_bytes_are_kept(dag: TinyDag) -> None:
    dag.run("extract")
    expected = dag.published("extract")
    dag.set("extract", engine="streamed")
    dag.run("extract")
    assert dag.published("extract") == expected


@pytest.mark.parametrize(
    ("engine", "step", "steps"),
    [*[("resident", step, 27) for step in (1, 8, 9, 10, 26, 27)],
     *[("streamed", step, 25) for step in (1, 3, 4, 12, 24, 25)]],
)  # fmt: skip
def test_an_interrupted_extraction_ends_with_the_same_bytes(
    dag: TinyDag, engine: str, step: int, steps: int
) -> None:
    dag.set("extract", engine=engine)
    dag.run("extract")
    expected = dag.published("extract")
    shutil.rmtree(dag.root / "scratch")
    shutil.rmtree(dag.root / "artifacts/extract")
    with pytest.raises(Stopped, match=f"step {step} of {steps}"):
        dag.run("extract", StopAt("main", step))
    assert dag.published("extract") == {}
    dag.run("extract")
    assert dag.published("extract") == expected


def test_more_anchors_than_blocks_behind_the_prefix_are_refused(dag: TinyDag) -> None:
    dag.set("extract", anchors=6)  # of 8 blocks 3 are the prefix
    with pytest.raises(ValueError, match="'anchors' is 6.*only 5 lie behind the prefix of 3"):
        dag.run("extract")


def test_anchors_end_equal_shares_of_the_harm_behind_the_prefix() -> None:
    harms = [9.0, 9.0, 1.0, 1.0, 0.5, 1.5, 1.0, 1.0]
    assert choose_anchors(harms, 2, 0) == ()
    assert choose_anchors(harms, 2, 1) == (7,)
    assert choose_anchors(harms, 2, 2) == (5, 7)
    assert choose_anchors(harms, 2, 3) == (3, 5, 7)
    assert choose_anchors(harms, 2, 6) == (2, 3, 5, 6, 7)  # block 5 ends two shares
    assert choose_anchors([0.0] * 4, 1, 2) == (1, 3)  # nothing matters: any will do


def test_a_prefix_of_all_blocks_is_refused(dag: TinyDag) -> None:
    """0.9 of few blocks rounds to all of them; nothing would be left to teach, nor be kept."""
    tiny_llama(blocks=4).bfloat16().save_pretrained(dag.teacher_folder)
    dag.set("extract", prefix_depth=0.9, anchors=1)
    with pytest.raises(ValueError, match="prefix"):
        dag.run("extract")


def test_more_tokens_than_the_vocabulary_has_are_refused_by_name(dag: TinyDag) -> None:
    dag.set("extract", top_k=98)
    with pytest.raises(ValueError, match="top_k.*97"):
        dag.run("extract")
