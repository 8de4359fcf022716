"""Benchmark: every score is what a naive count gives, and no number is surer than it may be."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stages.benchmark.scoring
from modeling.blocks import drop_blocks
from stages.benchmark.scoring import (
    MEASURES,
    TEACHER,
    Scores,
    compare,
    estimate,
    score_batch,
)
from stages.benchmark.stage import Params, flatten, read_texts, score_all
from stages.formats.tokens import write_rows
from stages.process import Stopped
from tests.stages.lessons import teacher
from tests.stages.project import make_project
from tests.stages.tiny_dag import StopAt
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

TOKENS = torch.arange(3 * 50).view(3, 50).mul(31).remainder(97)  # more than one chunk of logits
PARAMS = Params(
    batch_rows=2, resamples=100, speed_rounds=1, drift_rows=2, capability="tools",
    conversations=("arithmetic-tools",), problems=4, max_own_tokens=8, max_calls=1,
    routed_queries=2, seed=0,
)  # fmt: skip


def pruned(build: Callable, *dropped: int):
    model = build()
    drop_blocks(model, list(dropped))
    return model


@torch.no_grad()
def naive(model, other, row: Tensor) -> tuple[float, float, float]:
    """KL, CE and agreement of one row, one token at a time."""
    p, q = (
        m(row[None], use_cache=False).logits[0].double().log_softmax(-1) for m in (model, other)
    )
    kl = ce = agree = 0.0
    for at in range(len(row) - 1):
        kl += sum(p[at, v].exp().item() * (p[at, v] - q[at, v]).item() for v in range(97))
        ce -= q[at, row[at + 1]].item()
        agree += float(p[at].argmax() == q[at].argmax())
    return kl / (len(row) - 1), ce / (len(row) - 1), agree / (len(row) - 1)


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_scores_are_those_of_a_count_token_by_token(
    build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.benchmark.scoring, "CHUNK_TOKENS", 60)  # more than one of them
    models = {TEACHER: build(), "student": pruned(build, 1)}
    found = score_batch(models, TOKENS)
    for name, model in models.items():
        expected = [naive(models[TEACHER], model, row) for row in TOKENS]
        for measure, column in zip(MEASURES, zip(*expected, strict=True), strict=True):
            assert found[name][measure].tolist() == pytest.approx(list(column), rel=1e-4, abs=1e-5)
    assert found["student"]["kl"].min() > 0.01  # the two do differ


def test_a_teacher_against_itself_is_perfect() -> None:
    found = score_batch({TEACHER: teacher(), "student": teacher()}, TOKENS)
    for name in (TEACHER, "student"):
        assert found[name]["kl"].abs().max() < 1e-5
        assert found[name]["agree"].tolist() == [1.0] * 3
    assert torch.equal(found["student"]["ce"], found[TEACHER]["ce"])


def test_a_score_does_not_depend_on_who_else_is_scored_or_on_the_other_rows() -> None:
    models = {TEACHER: tiny_llama(), "student": pruned(tiny_llama, 1), "other": tiny_llama(seed=1)}
    together = score_batch(models, TOKENS)
    models.pop("other")
    for number, row in enumerate(TOKENS):
        alone = score_batch(models, row[None])
        for measure in MEASURES:
            expected = together["student"][measure][number].item()
            assert alone["student"][measure].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {TEACHER: tiny_llama(), "student": pruned(tiny_llama, 1)}
    whole = score_batch(models, TOKENS)
    monkeypatch.setattr(stages.benchmark.scoring, "CHUNK_TOKENS", 11)
    for name, measures in score_batch(models, TOKENS).items():
        for measure, values in measures.items():
            torch.testing.assert_close(values, whole[name][measure], atol=1e-6, rtol=1e-5)


# --- estimates -------------------------------------------------------------------------------


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    covered = 0
    for number in range(200):
        generator = torch.Generator().manual_seed(number)
        found = estimate(torch.randn(40, generator=generator) * 0.3 + 2.0, 300, seed=number)
        assert found.low < found.value < found.high
        covered += found.low < 2.0 < found.high
    assert 175 <= covered <= 199


def test_a_ratio_is_the_exponential_of_the_mean_and_of_its_interval() -> None:
    rows = torch.randn(30) * 0.1 + 0.2
    plain, ratio = estimate(rows, 500, 0), estimate(rows, 500, 0, exponential=True)
    for name in ("value", "low", "high"):
        assert getattr(ratio, name) == pytest.approx(math.exp(getattr(plain, name)))


@pytest.mark.parametrize("rows", [[0.7], [0.1] * 7, [0.0] * 3, [1e-8, 2e-8]])
@pytest.mark.parametrize("exponential", [True, False])
def test_an_interval_never_leaves_its_value_out(rows: list[float], exponential: bool) -> None:
    """A chart with bars of negative length is refused by matplotlib."""
    found = estimate(torch.tensor(rows), 1000, 0, exponential)
    assert found.low <= found.value <= found.high


def test_an_estimate_is_written_with_its_interval() -> None:
    assert estimate(torch.tensor([0.25] * 4), 100, 0).format() == "0.250 [0.250, 0.250]"


def scored() -> Scores:
    """Scores of two models on two texts, four rows each."""
    scores = Scores()
    models = {TEACHER: teacher(), "student": teacher(), "other": tiny_llama(seed=1)}
    tokens = torch.cat([TOKENS, TOKENS[:1].flip(1)])
    for text in ("docs", "sums"):
        for name, measures in score_batch(models, tokens[:, :20]).items():
            for measure, values in measures.items():
                scores.add(f"{name}/{text}/{measure}", values)
        tokens = tokens.roll(7, 1)
    return scores


def test_a_perfect_student_has_a_ratio_of_one_without_a_doubt() -> None:
    found = compare(scored(), "student", "docs", 200, 0)
    ratio = found["perplexity_ratio"]
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
    assert found["kl"].value == pytest.approx(0.0, abs=1e-5)
    assert found["agreement"].value == 1.0


def test_the_ratio_is_paired_so_it_is_surer_than_the_perplexities() -> None:
    scores = scored()
    found = compare(scores, "other", "docs", 1000, 0)
    own, whole = scores.rows["other/docs/ce"].double(), scores.rows["teacher/docs/ce"].double()
    assert found["perplexity"].value == pytest.approx(own.mean().exp().item())
    assert found["perplexity_ratio"].value == pytest.approx((own - whole).mean().exp().item())
    shifted = Scores({"teacher/docs/ce": whole, "s/docs/ce": whole + 0.5})  # rows differ, not this
    shifted.rows |= {"s/docs/kl": whole, "s/docs/agree": whole}
    ratio = compare(shifted, "s", "docs", 1000, 0)["perplexity_ratio"]
    assert ratio.low == pytest.approx(ratio.high) == pytest.approx(math.exp(0.5))


# --- the stage's own parts -------------------------------------------------------------------


def test_scores_come_back_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    scores, fresh = scored(), Scores()
    scores.batches = 5
    scores.save(tmp_path)
    fresh.load(tmp_path)
    assert fresh.batches == 5 and fresh.rows.keys() == scores.rows.keys()
    assert all(torch.equal(fresh.rows[key], scores.rows[key]) for key in scores.rows)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_interrupted_benchmark_goes_on_to_the_same_scores(tmp_path: Path, step: int) -> None:
    models = {TEACHER: teacher(), "student": tiny_llama(seed=1)}
    texts = {"docs": TOKENS[:, :12], "sums": TOKENS[:, 12:30]}  # two batches each
    calm, stopped = make_project(tmp_path / "calm"), make_project(tmp_path / "stopped")
    expected = score_all(models, texts, PARAMS, calm.job())
    stop = StopAt("main", step)
    job = stopped.job(stop=stop)
    stop.watch(job)
    with pytest.raises(Stopped, match=f"step {step} of 4"):
        score_all(models, texts, PARAMS, job)
    found = score_all(models, texts, PARAMS, stopped.job())
    assert found.rows.keys() == expected.rows.keys()
    assert all(torch.equal(found.rows[key], expected.rows[key]) for key in found.rows)
    assert [len(rows) for rows in found.rows.values()] == [3] * 12
    assert stopped.curve() == calm.curve()


def test_texts_that_bear_one_name_are_kept_apart(tmp_path: Path) -> None:
    for split, source in [("heldout", "sums"), ("heldout", "python-docs"), ("benchmark", "sums")]:
        write_rows(tmp_path, split, source, np.full((2, 4), len(split)))
    found = read_texts(tmp_path)
    assert list(found) == ["python-docs", "sums", "sums-benchmark"]
    assert found["sums"][0, 0] == len("heldout") and found["sums-benchmark"][0, 0] == len(
        "benchmark"
    )


def test_metrics_have_one_flat_name_each_and_the_students_intervals() -> None:
    scores = scored()
    models = (TEACHER, "student", "other")
    table = {
        name: {text: compare(scores, name, text, 100, 0) for text in ("docs", "sums")}
        for name in models
    }
    flat = flatten(table)
    assert len(flat) == 2 * 4 * (3 + 2)
    assert flat["other.sums.kl"] == pytest.approx(table["other"]["sums"]["kl"].value, abs=1e-6)
    assert flat["student.docs.kl_high"] == pytest.approx(
        table["student"]["docs"]["kl"].high, abs=1e-6
    )
    assert all(isinstance(value, float) and math.isfinite(value) for value in flat.values())
