"""A teacher with another tokenizer goes through profile, extract and distill."""

import json
from pathlib import Path

import pytest
import torch

from modeling.loading import locate, open_model, open_tokenizer
from stages.formats.importance import read_importance
from stages.formats.other_tokens import open_tongues, reread_rows
from stages.formats.targets import TeacherTargets
from stages.formats.tokens import read_all_rows
from stages.process import Stopped
from tests.modeling.vocabularies import trained_bpe
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag
from tests.stages.two_tongues import GUEST, ROW_TOKENS, make_two_tongues


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    return make_two_tongues(tmp_path, monkeypatch)


def extracted(dag: TinyDag) -> TeacherTargets:
    """The guest's targets, profile and all."""
    dag.run("profile", teacher=GUEST)
    dag.run("extract", teacher=GUEST)
    return TeacherTargets(dag.root / "artifacts/extract" / GUEST)


def masses_of(targets, vocabulary: int) -> torch.Tensor:
    """All that is kept of each position's distribution: (B, T, V)."""
    dense = torch.zeros(*targets.ids.shape[:2], vocabulary)
    return dense.scatter(-1, targets.ids, targets.log_probs.exp())


def test_its_targets_are_in_the_rows_tokens_without_states(dag: TinyDag) -> None:
    targets = extracted(dag)
    rows = torch.from_numpy(read_all_rows(dag.root / "artifacts/prepare", "train", 0))
    batch = targets.rows(torch.arange(10))
    assert torch.equal(batch.tokens, rows)
    assert batch.prefix is None and not batch.anchors
    assert int(batch.targets.ids.max()) < 330
    kept = batch.targets.log_probs.exp().sum(-1) + batch.targets.tail
    torch.testing.assert_close(kept, torch.ones_like(kept), atol=3e-3, rtol=0)
    assert len(read_importance(dag.root / "artifacts/profile" / GUEST)) == 8


@torch.no_grad()
def test_where_both_tokens_end_the_answer_is_the_teachers_own(dag: TinyDag) -> None:
    """Of a first token of the teacher's that the student has whole, and no token else."""
    dag.set("extract", top_k=330)
    batch = extracted(dag).rows(torch.arange(4))
    model, tokenizer = open_model(locate(GUEST)), open_tokenizer(locate(GUEST))
    own = open_tokenizer(locate(TEACHER))
    kept = masses_of(batch.targets, 330)
    text = own.decode(batch.tokens[0, :3].tolist())
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    given = torch.tensor([[tokenizer.eos_token_id, *ids]])
    p = model(given).logits[0, -1].softmax(-1)
    end = kept[0, 2, own.eos_token_id] / p[tokenizer.eos_token_id]
    assert 1 <= end < 1.5  # tokens that go on with the student's last one are left out
    letter = kept[0, 2, own("Z")["input_ids"][0]] / p[tokenizer("Z")["input_ids"][0]]
    assert letter == pytest.approx(end.item(), rel=0.02)


@pytest.mark.parametrize("schedule", ["mixed", "sequence"])
def test_the_student_learns_from_both_and_retention_is_measured(
    schedule: str, dag: TinyDag
) -> None:
    extracted(dag)
    dag.run("profile")
    dag.run("extract")
    dag.set(
        "distill", schedule=schedule, teacher_order=[TEACHER, GUEST], controls=[],
        steps=30, learning_rate=1e-2, protect=False, ce_weight=0.0,
    )  # fmt: skip
    found = dag.run("distill")
    skill = f"retention.{GUEST}.after"
    if schedule == "mixed":
        assert found[f"{skill}.all"] > 0
    else:
        assert found[f"{skill}.{GUEST}"] < found[f"{skill}.{TEACHER}"]
    facts = json.loads(dag.published("distill")["student.json"])
    assert facts["teachers"] == [TEACHER, GUEST]


def test_an_extraction_that_was_stopped_ends_with_the_same_bits(dag: TinyDag) -> None:
    dag.run("profile", teacher=GUEST)
    with pytest.raises(Stopped):
        dag.run("extract", StopAt("main", 9), GUEST)
    dag.run("extract", teacher=GUEST)
    found = dag.published(f"extract/{GUEST}")
    dag.set("extract", shard_rows=10)  # whole, in one shard
    dag.run("extract", teacher=GUEST)
    whole = TeacherTargets(dag.root / "artifacts/extract" / GUEST).rows(torch.arange(10))
    assert len(found) > 3
    dag.set("extract", shard_rows=4)
    dag.run("extract", teacher=GUEST)
    assert dag.published(f"extract/{GUEST}") == found
    again = TeacherTargets(dag.root / "artifacts/extract" / GUEST).rows(torch.arange(10))
    assert torch.equal(whole.targets.ids[..., 0], again.targets.ids[..., 0])


def test_rows_read_again_are_the_same_text(dag: TinyDag) -> None:
    prepared = dag.root / "artifacts/prepare"
    guest, own = open_tokenizer(locate(GUEST)), open_tokenizer(locate(TEACHER))
    rows = read_all_rows(prepared, "calibration", 0)
    found = reread_rows(rows, open_tongues(prepared, GUEST, guest))
    assert found.shape[1] == ROW_TOKENS and len(found) < len(rows)  # a larger vocabulary
    wanted = "<end>".join(own.decode(row, errors="ignore") for row in rows)
    text = guest.decode(found.flatten())
    assert text[:40] == wanted[:40] and found.max() > 330


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("answers", "sampled"), ("engine", "vllm")])
def test_what_it_cannot_give_is_refused_before_the_model_is_opened(
    name: str, value: str, dag: TinyDag
) -> None:
    dag.run("profile", teacher=GUEST)
    (Path(locate(GUEST).path) / "model.safetensors").unlink()
    changed = {name: value}
    if value == "vllm":
        changed |= {"prefix_depth": 0.0, "anchors": 0}
    dag.set("extract", **changed)
    with pytest.raises(ValueError, match=f"'{name}' cannot be '{value}'|needs vllm|vllm"):
        dag.run("extract", teacher=GUEST)


def test_a_tokenizer_that_loses_bytes_is_refused_before_the_model_is_opened(dag: TinyDag) -> None:
    from transformers import AutoTokenizer

    guest = Path(locate(GUEST).path)
    (guest / "model.safetensors").unlink()
    state = json.loads((guest / "tokenizer.json").read_text(encoding="utf-8"))
    (guest / "tokenizer.json").write_text(json.dumps(state | {"decoder": None}), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(guest)
    with pytest.raises(ValueError, match="that of 'guest' cannot be translated: .*loses bytes"):
        dag.run("profile", teacher=GUEST)


def test_a_student_is_not_cut_from_a_teacher_with_another_tokenizer(dag: TinyDag) -> None:
    extracted(dag)
    dag.run("profile")
    dag.run("extract")
    dag.set("distill", teacher_order=[GUEST, TEACHER])
    with pytest.raises(ValueError, match="cut from the first teacher, 'guest'.*teacher_order"):
        dag.run("distill")


def test_rows_of_a_tokenizer_that_has_changed_are_refused(dag: TinyDag) -> None:
    trained_bpe(400).save_pretrained(dag.teacher_folder)
    with pytest.raises(ValueError, match="not the one that made the rows any more"):
        dag.run("profile", teacher=GUEST)
