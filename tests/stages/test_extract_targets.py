"""Targets on disk: what is read is what was extracted, in an order that a seed and a step give."""

from pathlib import Path

import pytest
import torch

from stages.digests import Damaged
from stages.extract.stage import mean_of
from stages.formats.targets import TeacherTargets
from tests.stages.lessons import (
    ANCHORS,
    PREFIX,
    answers,
    rows,
    subspaces_of,
    teacher,
    write_targets,
)

# --- shards ----------------------------------------------------------------------------------


def test_targets_come_back_as_they_were_extracted(tmp_path: Path) -> None:
    model, tokens = teacher(), rows(10)
    targets = write_targets(tmp_path, model, tokens, shard_rows=4)
    kinds = ["anchor-3", "anchor-5", "answers", "prefix"]
    expected_files = [f"{kind}-0000{n}.safetensors" for kind in kinds for n in range(3)]
    assert sorted(targets.header.files) == expected_files
    assert (targets.header.rows, targets.header.prefix_blocks) == (10, PREFIX)
    subspaces = subspaces_of(model, tokens)
    expected = [answers(model, part, subspaces) for part in tokens.split(4)]
    whole = {key: torch.cat([part[key] for part in expected]) for key in expected[0]}
    picks = torch.tensor([9, 0, 4])
    batch = targets.rows(picks)
    assert torch.equal(batch.tokens, tokens[picks])
    assert torch.equal(batch.prefix, whole["prefix"][picks])
    assert torch.equal(batch.targets.ids, whole["ids"][picks].long())
    assert torch.equal(batch.targets.log_probs, whole["log_probs"][picks].float())
    assert torch.equal(batch.targets.tail, whole["tail"][picks].float().exp())
    for block in ANCHORS:
        assert torch.equal(batch.anchors[block], whole[f"anchor.{block}"][picks].float())


@pytest.mark.parametrize("kind", ["answers", "anchor-3", "prefix"])
@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_flipped_byte_is_refused_naming_the_file_and_what_to_do(
    tmp_path: Path, kind: str, shard: int, place: float
) -> None:
    write_targets(tmp_path, teacher(), rows(10), shard_rows=4)
    path = tmp_path / f"{kind}-0000{shard}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1 if place < 0 else int(place * len(content))] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(Damaged, match=f"{path}.*damaged.*--reset extract"):
        TeacherTargets(tmp_path)


def test_a_missing_shard_is_refused_naming_the_file_and_what_to_do(tmp_path: Path) -> None:
    write_targets(tmp_path, teacher(), rows(10), shard_rows=4)
    (tmp_path / "answers-00001.safetensors").unlink()
    with pytest.raises(Damaged, match="answers-00001.safetensors.*--reset extract"):
        TeacherTargets(tmp_path)


def test_the_mean_tail_is_that_of_all_tokens(tmp_path: Path) -> None:
    targets = write_targets(tmp_path, teacher(), rows(10), shard_rows=4)  # shards of 4, 4 and 2
    expected = targets.rows(torch.arange(10)).targets.tail.mean().item()
    assert mean_of(tmp_path, "tail", exponential=True) == pytest.approx(expected, rel=1e-5)


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    """Ten rows, each known by its first token."""
    return write_targets(tmp_path_factory.mktemp("targets"), teacher(), rows(10))


def firsts(targets: TeacherTargets, batch_rows: int, steps: int, seed: int, start: int = 0):
    return [b.tokens[:, 0].tolist() for b in targets.batches(batch_rows, steps, seed, start)]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 11, 12])
def test_starting_at_a_step_gives_what_comes_after_skipping_as_many(
    targets: TeacherTargets, start: int
) -> None:
    assert firsts(targets, 2, 12, 0, start) == firsts(targets, 2, 12, 0)[start:]


def test_the_order_follows_from_the_seed(targets: TeacherTargets) -> None:
    torch.manual_seed(1)
    first = firsts(targets, 2, 10, seed=0)
    torch.manual_seed(2)  # whatever else draws random numbers
    assert firsts(targets, 2, 10, seed=0) == first
    assert firsts(targets, 2, 10, seed=1) != first


@pytest.mark.parametrize(("batch_rows", "a_pass"), [(1, 10), (2, 5), (3, 3), (10, 1)])
def test_each_pass_visits_a_row_once_at_most_in_another_order(
    targets: TeacherTargets, batch_rows: int, a_pass: int
) -> None:
    steps = firsts(targets, batch_rows, 3 * a_pass, seed=0)
    passes = [sum(steps[n : n + a_pass], []) for n in range(0, 3 * a_pass, a_pass)]
    for seen in passes:
        assert len(set(seen)) == len(seen) == batch_rows * a_pass
    assert passes[0] != passes[1] != passes[2]


def test_no_row_is_left_out_for_good(targets: TeacherTargets) -> None:
    """Three rows a batch leave one of ten out of each pass; it must not be the same one."""
    assert len({row for batch in firsts(targets, 3, 30, seed=0) for row in batch}) == 10


def test_a_batch_of_more_rows_than_there_are_is_refused_before_anything_is_taught(
    targets: TeacherTargets,
) -> None:
    with pytest.raises(ValueError, match="batch of 11 rows is more than the 10.*batch_rows"):
        next(targets.batches(11, 5, 0, 0))


@pytest.mark.parametrize("wider", ["embed_tokens", "lm_head"])
def test_ids_and_tokens_are_as_wide_as_the_wider_of_head_and_embedding(wider: str) -> None:
    """Some models read tokens that they never answer with, as that of an image."""
    model, tokens = teacher(), rows(2)
    parent = model if wider == "lm_head" else model.model
    weight = torch.randn(70_000, model.config.hidden_size, dtype=model.dtype)
    getattr(parent, wider).weight = torch.nn.Parameter(weight, requires_grad=False)
    kept = answers(model, tokens, subspaces_of(model, tokens))
    assert (kept["tokens"].dtype, kept["ids"].dtype) == (torch.int32, torch.int32)
    with torch.no_grad():
        logits = model(tokens).logits
    ids = kept["ids"][..., :1].long()
    assert torch.equal(logits.gather(-1, ids), logits.amax(-1, keepdim=True))
    assert wider != "lm_head" or ids.max() >= 1 << 16
