"""Files that stages meet through: what is read is what was written, and damage is seen."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.digests import Damaged
from stages.formats.importance import (
    BlockImportance,
    Subspaces,
    bootstrap_interval,
    read_importance,
    read_subspaces,
    share_of_depth,
    write_importance,
)
from stages.formats.targets import TeacherTargets, write_header, write_shard
from stages.formats.tokens import (
    SPLITS,
    read_all_rows,
    read_rows,
    write_documents,
    write_rows,
)
from stages.profile.subspace import RunningCovariance

# --- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [96, 2**16 - 1, 2**16, 2**31])
def test_token_rows_come_back_whatever_the_size_of_the_vocabulary(
    tmp_path: Path, largest: int
) -> None:
    rows = np.array([[0, 1, largest], [largest, 7, 0]], dtype=np.int64)
    write_rows(tmp_path, "train", "docs", rows)
    found = read_rows(tmp_path, "train")
    assert list(found) == ["docs"]
    assert found["docs"].dtype == np.int64
    assert np.array_equal(found["docs"], rows)


def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", "docs", np.full((10, 100), 2**16 - 1))
    assert np.load(tmp_path / "tokens/train/docs.npy").nbytes == 2 * 1000


def test_no_rows_come_back_as_no_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, "train", "docs", np.zeros((0, 16), dtype=np.int64))
    assert read_rows(tmp_path, "train")["docs"].shape == (0, 16)


def test_rows_are_kept_apart_by_split_and_source(tmp_path: Path) -> None:
    for number, (split, source) in enumerate(
        [("train", "a"), ("train", "b"), ("heldout", "a"), ("benchmark", "humaneval.v1")]
    ):
        write_rows(tmp_path, split, source, np.full((2, 4), number))
    assert {name: rows[0, 0] for name, rows in read_rows(tmp_path, "train").items()} == {
        "a": 0, "b": 1,
    }  # fmt: skip
    assert read_rows(tmp_path, "heldout")["a"][0, 0] == 2
    assert list(read_rows(tmp_path, "benchmark")) == ["humaneval.v1"]


@pytest.mark.parametrize("split", ["trian", "calibration"])
def test_a_split_that_is_not_there_is_refused_naming_the_splits(tmp_path: Path, split: str) -> None:
    write_rows(tmp_path, "train", "docs", np.zeros((1, 16)))
    with pytest.raises(ValueError, match=f"no split '{split}'.*{', '.join(SPLITS)}"):
        read_rows(tmp_path, split)


def test_all_rows_are_a_shuffle_that_follows_from_the_seed(tmp_path: Path) -> None:
    for source, start in (("a", 0), ("b", 100)):
        write_rows(tmp_path, "train", source, np.arange(start, start + 60).reshape(20, 3))
    first, again, other = (read_all_rows(tmp_path, "train", seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert sorted(map(tuple, first)) == sorted(map(tuple, other))
    assert {row[0] for row in first[:20]} & {row[0] for row in first if row[0] >= 100}  # mixed


def test_documents_come_back_line_by_line_whatever_is_in_them(tmp_path: Path) -> None:
    documents = [
        {"split": "train", "source": "docs", "id": "1", "text": 'line\nline "quoted" \u2028 end'},
        {"split": "heldout", "source": "docs", "id": "2", "text": "déjà vu 漢字 \U0001f600"},
    ]
    splits = {entry["split"]: [SimpleNamespace(**entry)] for entry in documents}
    write_documents(tmp_path, splits)
    text = (tmp_path / "documents.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == documents


# --- importance ------------------------------------------------------------------------------


def test_importance_comes_back_to_the_bit(tmp_path: Path) -> None:
    blocks = [BlockImportance(i, 0.1 * i, 1e-17, 1 / 3, -0.0, 1, 2, 3 + i) for i in range(4)]
    subspaces = Subspaces(torch.randn(4, 6), torch.randn(4, 6, 6)[:, :, :2], torch.rand(4, 6))
    write_importance(tmp_path, blocks, subspaces)
    assert read_importance(tmp_path) == blocks
    found = read_subspaces(tmp_path)
    for name in ("mean", "basis", "variance"):
        assert torch.equal(getattr(found, name), getattr(subspaces, name)), name


def test_whitened_coordinates_have_unit_variance_and_do_not_correlate() -> None:
    mixing = torch.randn(8, 8) * torch.logspace(-1, 2, 8)[:, None]  # variances over six decades
    for _ in range(2):
        state = torch.randn(4, 1000, 8) @ mixing + torch.randn(8) * 10
        covariance = RunningCovariance(8)
        covariance.add(state)
        mean, directions, variance = (part[None] for part in covariance.principal())
        subspaces = Subspaces(mean, directions[:, :, :5], variance)
        coordinates = subspaces.whiten(0, state)
        assert coordinates.shape == (4, 1000, 5) and coordinates.dtype == torch.float32
        found = torch.cov(coordinates.flatten(0, 1).T)
        torch.testing.assert_close(found, torch.eye(5), atol=5e-3, rtol=0)
        torch.testing.assert_close(
            coordinates.mean((0, 1)), torch.zeros(5), atol=5e-3, rtol=0
        )  # fmt: skip


def test_a_direction_without_variance_gives_finite_coordinates() -> None:
    subspaces = Subspaces(torch.zeros(1, 3), torch.eye(3)[None], torch.tensor([[4.0, 1.0, 0.0]]))
    found = subspaces.whiten(0, torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0]]))


@pytest.mark.parametrize(("depth", "expected"), [(0.0, 0), (1 / 3, 10), (0.333, 10), (1.0, 30)])
def test_a_depth_becomes_a_number_of_blocks(depth: float, expected: int) -> None:
    assert share_of_depth(depth, 30) == expected


def test_the_bootstrap_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    covered = 0
    for number in range(100):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(40, generator=generator) + 3.0
        low, high = bootstrap_interval(rows, 300, seed=number)
        assert low < rows.mean() < high
        covered += low < 3.0 < high
    assert 85 <= covered <= 100


def test_the_bootstrap_interval_narrows_with_the_root_of_the_rows() -> None:
    rows = torch.randn(1600)
    widths = []
    for count in (25, 400, 1600):
        low, high = bootstrap_interval(rows[:count], 1000, seed=0)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]
    assert 2.5 < widths[0] / widths[1] < 6.5  # 16 times the rows: a quarter of the width


def test_the_bootstrap_interval_follows_from_its_seed() -> None:
    rows = torch.randn(20)
    assert bootstrap_interval(rows, 200, seed=1) == bootstrap_interval(rows, 200, seed=1)
    assert bootstrap_interval(rows, 200, seed=1) != bootstrap_interval(rows, 200, seed=2)


def test_equal_rows_leave_no_doubt() -> None:
    assert bootstrap_interval(torch.full((5,), 0.25), 100, seed=0) == (0.25, 0.25)


# --- targets ---------------------------------------------------------------------------------


def write_targets(folder: Path, shards: int = 3, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    """Write shards of (rows, 5) tokens with k = 4, D = 6 and one anchor of 3 coordinates."""
    written = []
    for number in range(shards):
        log_probs = torch.randn(rows, 5, 4).log_softmax(-1) - 0.1
        written.append(
            {
                "tokens": torch.arange(rows * 5).view(rows, 5).int() + 100 * number,
                "ids": torch.randint(0, 97, (rows, 5, 4)).int(),
                "log_probs": log_probs.half(),
                "tail": torch.full((rows, 5), 0.1).log().half(),
                "prefix": torch.randn(rows, 5, 6).bfloat16(),
                "anchor.2": torch.randn(rows, 5, 3).bfloat16(),
            }
        )
        write_shard(folder, number, written[-1])
    fields = {"teacher": "ada", "prefix_blocks": 1, "anchors": (2,)}
    write_header(folder, **fields, rows=shards * rows, row_tokens=5)
    return written


def test_targets_come_back_in_the_order_they_were_written(tmp_path: Path) -> None:
    written = write_targets(tmp_path)
    targets = TeacherTargets(tmp_path)
    assert (targets.header.teacher, targets.header.anchors, targets.header.rows) == ("ada", (2,), 6)
    batch = targets.rows(torch.tensor([0, 3, 5]))
    for row, (shard, place) in enumerate([(0, 0), (1, 1), (2, 1)]):
        source = written[shard]
        assert torch.equal(batch.tokens[row], source["tokens"][place].long())
        assert torch.equal(batch.targets.ids[row], source["ids"][place].long())
        assert torch.equal(batch.targets.log_probs[row], source["log_probs"][place].float())
        assert torch.equal(batch.prefix[row], source["prefix"][place])
        assert torch.equal(batch.anchors[2][row], source["anchor.2"][place].float())
    torch.testing.assert_close(batch.targets.tail, torch.full((3, 5), 0.1), atol=2e-4, rtol=0)


def test_every_position_but_the_last_has_the_next_token_as_its_label(tmp_path: Path) -> None:
    written = write_targets(tmp_path)
    batch = TeacherTargets(tmp_path).rows(torch.tensor([0, 1]))
    labels, targets = batch.next_token()
    assert torch.equal(labels.view(2, 4), written[0]["tokens"][:, 1:].long())
    assert torch.equal(targets.ids.view(2, 4, 4), written[0]["ids"][:, :-1].long())
    assert targets.log_probs.shape == (8, 4) and targets.tail.shape == (8,)


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    write_targets(tmp_path)
    path = tmp_path / "answers-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match="answers-00001.safetensors is damaged.*--reset extract"):
        TeacherTargets(tmp_path)


def test_a_pass_over_the_targets_goes_on_exactly_where_it_was_left(tmp_path: Path) -> None:
    write_targets(tmp_path)
    targets = TeacherTargets(tmp_path)
    whole = [batch.tokens for batch in targets.batches(rows=2, steps=8, seed=0, start=0)]
    rest = [batch.tokens for batch in targets.batches(rows=2, steps=8, seed=0, start=5)]
    assert len(whole) == 8
    assert all(map(torch.equal, whole[5:], rest))
    first_epoch = torch.cat(whole[:3])[:, 0]
    assert len(first_epoch.unique()) == 6  # every row once
    assert not torch.equal(first_epoch, torch.cat(whole[3:6])[:, 0])  # in another order


def test_a_batch_of_more_rows_than_there_are_is_refused(tmp_path: Path) -> None:
    write_targets(tmp_path)
    with pytest.raises(ValueError, match="batch of 7 rows is more than the 6 rows"):
        next(TeacherTargets(tmp_path).batches(rows=7, steps=1, seed=0, start=0))
