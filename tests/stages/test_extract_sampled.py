"""Sampled targets: what is stored is what was drawn, whatever the way there; and it teaches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from modeling.blocks import dissect
from modeling.memory import WillNotFit
from modeling.samples import Samples, read_samples
from modeling.streaming import Passage
from modeling.weights import Resident
from stages.__main__ import check_all_params
from stages.extract.harvest import Sampling, Wanted, harvest
from stages.formats.targets import TeacherTargets, write_header, write_shard
from stages.process import Stopped
from tests.stages.lessons import ANCHORS, PREFIX, rows, subspaces_of, teacher
from tests.stages.test_extract_interrupted import Memory, least_memory
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag, make_tiny_dag
from tests.tiny import REPOSITORY

SEED = 3


def drawn(model, tokens: torch.Tensor, draws: int, first: int = 0) -> Samples:
    passage = Passage(model, dissect(model).blocks, Resident(model), [{"input_ids": tokens}])
    list(passage.run())
    return next(read_samples(passage, draws, SEED, first))


def write_targets(folder: Path, model, tokens: torch.Tensor, draws: int) -> TeacherTargets:
    """Shards of four rows, as the stage would write them."""
    wanted = Wanted(1, PREFIX, ANCHORS, subspaces_of(model, tokens), Sampling(draws, SEED))
    for number, part in enumerate(tokens.split(4)):
        inputs = {"input_ids": part, "use_cache": False}
        passage = Passage(model, dissect(model).blocks, Resident(model), [inputs])
        kept = {}
        for sheaf in harvest(passage, [part], wanted, first=number * 4 * tokens.shape[1]):
            kept.update(sheaf.tensors)
        write_shard(folder, number, kept)
    fields = {"teacher": "ada", "prefix_blocks": PREFIX, "anchors": ANCHORS}
    write_header(folder, draws, **fields, rows=len(tokens), row_tokens=tokens.shape[1])
    return TeacherTargets(folder)


# --- shards ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("draws", "dtype"), [(1, torch.uint8), (255, torch.uint8), (256, torch.uint16)]
)
def test_what_is_read_is_what_was_drawn(draws: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = teacher(), rows(10)
    targets = write_targets(tmp_path, model, tokens, draws)
    assert targets._ordered[0]["counts"].dtype == targets._ordered[0]["distinct"].dtype == dtype
    picks = torch.tensor([9, 0, 3, 4])  # of all three shards
    batch = targets.rows(picks)
    for row, pick in enumerate(picks.tolist()):
        part = tokens[pick // 4 * 4 :][:4]
        samples = drawn(model, part, draws, first=pick // 4 * 4 * tokens.shape[1])
        of_row = slice(pick % 4 * 16, (pick % 4 + 1) * 16)
        expected = torch.stack([torch.bincount(ids, minlength=97) for ids in samples.ids[of_row]])
        found = torch.zeros(16, 97).scatter_add_(
            -1, batch.targets.ids[row], batch.targets.shares[row]
        )
        torch.testing.assert_close(found, expected / draws)
        mean = samples.mean_log_prob()[of_row].float()
        torch.testing.assert_close(batch.targets.log_prob[row], mean, atol=1e-2, rtol=1e-3)
    assert torch.equal(batch.tokens, tokens[picks])


def test_positions_with_a_next_token_are_those_of_each_tensor(tmp_path: Path) -> None:
    batch = write_targets(tmp_path, teacher(), rows(4), 9).rows(torch.arange(4))
    labels, targets = batch.next_token()
    assert torch.equal(labels, batch.tokens[:, 1:].flatten())
    assert torch.equal(targets.ids, batch.targets.ids[:, :-1].flatten(0, 1))
    assert torch.equal(targets.shares, batch.targets.shares[:, :-1].flatten(0, 1))
    assert torch.equal(targets.log_prob, batch.targets.log_prob[:, :-1].flatten())


def test_targets_of_another_version_are_refused(tmp_path: Path) -> None:
    write_targets(tmp_path, teacher(), rows(4), 9)
    header = json.loads((tmp_path / "targets.json").read_text())
    del header["version"]
    (tmp_path / "targets.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="version 1 of the format, and 2 is read; extract it agai"):
        TeacherTargets(tmp_path)


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    dag = make_tiny_dag(tmp_path, monkeypatch)
    dag.set("extract", answers="sampled")
    return dag


def targets_of(dag: TinyDag) -> TeacherTargets:
    return TeacherTargets(dag.root / "artifacts/extract" / TEACHER)


def test_the_stage_says_what_it_kept(dag: TinyDag) -> None:
    metrics = dag.run("extract")
    targets = targets_of(dag)
    batch = targets.rows(torch.arange(10))
    assert targets.header.samples == 20
    torch.testing.assert_close(batch.targets.shares.sum(-1), torch.ones(10, 16))
    distinct = (batch.targets.shares > 0).sum(-1).float().mean().item()
    assert metrics["distinct_samples"] == pytest.approx(distinct, abs=0.01)
    assert metrics["entropy"] == pytest.approx(-batch.targets.log_prob.mean().item(), abs=1e-3)
    files = dag.root.glob(f"artifacts/extract/{TEACHER}/answers-*.safetensors")
    size = sum(path.stat().st_size for path in files) / batch.tokens.numel()
    assert metrics["answers_bytes_per_token"] == pytest.approx(size, abs=0.1)
    assert "top_k_mass" not in metrics


def test_streamed_from_disk_the_same_bytes_are_kept(dag: TinyDag) -> None:
    dag.run("extract")
    expected = dag.published("extract")
    dag.set("extract", engine="streamed")
    dag.run("extract")
    assert dag.published("extract") == expected


@pytest.mark.parametrize(("engine", "step"), [("resident", 9), ("resident", 10), ("streamed", 12)])
def test_an_interrupted_extraction_ends_with_the_same_bytes(
    dag: TinyDag, engine: str, step: int
) -> None:
    dag.set("extract", engine=engine)
    dag.run("extract")
    expected = dag.published("extract")
    shutil.rmtree(dag.root / "scratch")
    shutil.rmtree(dag.root / "artifacts/extract")
    with pytest.raises(Stopped, match=f"step {step} of"):
        dag.run("extract", StopAt("main", step))
    dag.run("extract")
    assert dag.published("extract") == expected


@pytest.mark.parametrize("changed", [{"shard_rows": 2}, {"shard_rows": 8}, {"batch_rows": 1}])
def test_shards_and_batches_do_not_change_what_is_drawn(dag: TinyDag, changed: dict) -> None:
    """But for logits that round differently in a batch of another shape."""
    dag.run("extract")
    one = targets_of(dag).rows(torch.arange(10))
    dag.set("extract", **changed)
    dag.run("extract")
    two = targets_of(dag).rows(torch.arange(10))
    assert torch.equal(one.tokens, two.tokens)
    dense = [
        torch.zeros(10, 16, 97).scatter_add_(-1, b.targets.ids, b.targets.shares)
        for b in (one, two)
    ]
    assert (dense[0] - dense[1]).abs().sum(-1).mean() < 0.02


def test_draws_count_in_what_a_token_takes_of_memory(
    dag: TinyDag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(tmp_path / "group", monkeypatch).set(least_memory(dag) + (1 << 20))
    dag.set("extract", engine="streamed", samples=65_535)
    with pytest.raises(WillNotFit, match="a batch of 32 tokens 0.03 GiB"):
        dag.run("extract")
    dag.set("extract", samples=20)
    assert dag.run("extract")["tokens"] == 160


def test_the_seed_decides_what_is_drawn(dag: TinyDag) -> None:
    found = []
    for seed in (0, 0, 1):
        dag.set("extract", seed=seed)
        dag.run("extract")
        found.append(dag.published("extract"))
        shutil.rmtree(dag.root / "scratch")
    assert found[0] == found[1] != found[2]


# --- teaching --------------------------------------------------------------------------------


def divergences(dag: TinyDag) -> list[float]:
    """The student's KL, step by step."""
    (curve,) = (dag.root / "scratch/distill").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    return [line["kl"] for line in lines if line["phase"] == "student"]


def test_a_student_learns_from_draws(dag: TinyDag) -> None:
    dag.run("extract")
    dag.set("distill", steps=60, ce_weight=0.0, anchor_weight=0.0, controls=[])
    dag.run("distill")
    kl = divergences(dag)
    assert sum(kl[-10:]) < 0.6 * sum(kl[:10])


def test_without_prefix_and_anchors_the_student_learns_as_with_them(dag: TinyDag) -> None:
    """It embeds the tokens itself; the loss begins where it begins with a stored prefix."""
    dag.set("distill", anchor_weight=0.0, controls=[], steps=3)
    first = {}
    for depth in (0.333, 0.0):
        dag.set("extract", prefix_depth=depth, anchors=0)
        dag.run("extract")
        dag.run("distill")
        first[depth] = divergences(dag)[0]
        shutil.rmtree(dag.root / "scratch")
    kept = {name.split("-")[0] for name in targets_of(dag).header.files}
    assert kept == {"answers"}
    assert first[0.0] == pytest.approx(first[0.333], rel=0.02)


def test_another_temperature_is_refused_before_a_model_is_opened(dag: TinyDag) -> None:
    dag.run("extract")
    dag.set("distill", temperature=2.0)
    shutil.rmtree(dag.teacher_folder)
    message = "'temperature' is 2.*temperature 1 only.*extract.answers to top_k"
    with pytest.raises(ValueError, match=message):
        dag.run("distill")


def test_contradictions_between_stages_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    params["extract"]["answers"] = "sampled"
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    assert check_all_params(file) == 0
    params["distill"]["temperature"] = 2.0
    file.write_text(yaml.safe_dump(params))
    assert check_all_params(file) == 2
    assert "'temperature' is 2" in capsys.readouterr().err
