"""Extract, interrupted or refused: the same bytes in the end, or none at all."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling.memory
import modeling.weights
from modeling.backends import compute_dtype
from modeling.checkpoint import BadCheckpoint, read_checkpoint
from modeling.memory import WillNotFit, need_of
from modeling.skeleton import OUTSIDE, build_skeleton
from modeling.streaming import NotFinite
from modeling.weights import left_on_disk
from stages.process import Stopped
from tests.stages.project import DONE, Project
from tests.stages.tiny_dag import BLOCKS, TEACHER, StopAt, TinyDag, make_tiny_dag
from tests.tiny import tiny_gpt2, tiny_llama

ROWS, ROW_TOKENS, BATCH_ROWS = 10, 16, 2


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    dag = make_tiny_dag(tmp_path, monkeypatch)
    dag.set("extract", engine="streamed")
    return dag


def forget(dag: TinyDag) -> None:
    """Drop what was done and published."""
    for folder in ("scratch", "artifacts/extract", "metrics"):
        shutil.rmtree(dag.root / folder, ignore_errors=True)


# --- less memory, or more, than before -------------------------------------------------------


class Memory:
    """The memory that is free for this process, by a control group of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "own").write_text("0::/\n")
        (folder / "memory.current").write_text("0")
        (folder / "memory.stat").write_text("file 0\n")
        patch.setattr(modeling.memory, "OWN_CGROUPS", folder / "own")
        patch.setattr(modeling.memory, "CGROUPS", folder)

    def set(self, free: int) -> None:
        (self.folder / "memory.max").write_text(str(free))


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(tmp_path / "group", monkeypatch)


def least_memory(dag: TinyDag) -> int:
    """What streaming one batch takes."""
    model, checkpoint = tiny_llama(blocks=BLOCKS), read_checkpoint(dag.teacher_folder)
    skeleton = build_skeleton(type(model), model.config, checkpoint, torch.bfloat16)
    blocks = [names for part, names in skeleton.parts.items() if part != OUTSIDE]
    dtype = compute_dtype(torch.device("cpu"))
    return need_of(
        checkpoint, blocks, (), left_on_disk(skeleton, checkpoint), dtype, BATCH_ROWS * ROW_TOKENS,
        ROWS * ROW_TOKENS, width=32, vocabulary=97,
    ).streamed  # fmt: skip


@pytest.mark.parametrize("step", [1, 8, 9, 10, 24])
@pytest.mark.parametrize("less", [True, False], ids=["less memory", "more memory"])
def test_the_size_of_a_group_survives_going_on_with_other_memory(
    step: int, less: bool, dag: TinyDag, memory: Memory
) -> None:
    """Three shards together are 25 steps, one by one 27."""
    little, much = least_memory(dag), least_memory(dag) + (1 << 20)
    before, after, steps = (much, little, 25) if less else (little, much, 27)
    memory.set(much)
    dag.run("extract")
    expected = dag.published("extract")
    forget(dag)
    memory.set(before)
    with pytest.raises(Stopped, match=f"step {step} of {steps}"):
        dag.run("extract", StopAt("main", step))
    memory.set(after)
    with pytest.raises(Stopped, match=f"step {step + 1} of {steps}"):
        dag.run("extract", StopAt("main", step + 1))
    dag.run("extract")
    assert dag.published("extract") == expected


def test_too_little_memory_is_refused_and_nothing_is_published(
    dag: TinyDag, memory: Memory
) -> None:
    memory.set(least_memory(dag) - 1)
    with pytest.raises(WillNotFit, match="a batch of 32 tokens .* lower batch_rows"):
        dag.run("extract")
    assert dag.published("extract") == {}


@pytest.mark.parametrize(("first", "then"), [("resident", "streamed"), ("streamed", "resident")])
def test_an_engine_chosen_anew_in_the_middle_changes_no_byte(
    first: str, then: str, dag: TinyDag, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto`, free memory decides; both engines take the head in the same pieces."""
    monkeypatch.setattr(modeling.weights, "PIECE_BYTES", 20 * 32 * 2)
    dag.set("extract", engine="auto")
    free = {"resident": 1 << 34, "streamed": least_memory(dag)}
    memory.set(1 << 34)
    dag.run("extract")
    expected = dag.published("extract")
    forget(dag)
    for engine, stop in ((first, 6), (then, 15), (first, None)):
        memory.set(free[engine])
        if stop:
            with pytest.raises(Stopped, match=f"step {stop} of 27"):
                dag.run("extract", StopAt("main", stop))
    dag.run("extract")
    assert dag.published("extract") == expected


# --- kill -9 ---------------------------------------------------------------------------------


def steps_done(dag: TinyDag) -> int:
    files = list((dag.root / "scratch" / f"extract@{TEACHER}").glob("*/metrics.jsonl"))
    return sum(len(file.read_bytes().splitlines()) for file in files)


def test_an_extraction_killed_again_and_again_at_random_ends_with_the_same_bytes(
    dag: TinyDag,
) -> None:
    dag.run("extract")
    expected = dag.published("extract")
    metrics = (dag.root / f"metrics/extract/{TEACHER}.json").read_text()
    forget(dag)
    project, chance, killed = Project(dag.root), random.Random(3), 0
    for after in (chance.randrange(2, 10), chance.randrange(3, 9)):
        process = project.start("extract", TEACHER, NANOFOUNDRY_CHECKPOINT_EVERY_S="0")
        goal = steps_done(dag) + after
        while process.poll() is None and steps_done(dag) < goal:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.communicate()
        killed += process.returncode == -9
    assert killed and dag.published("extract") == {}
    done = project.run("extract", TEACHER)
    assert done.returncode == DONE and "going on from step" in done.stdout, done.stderr
    assert dag.published("extract") == expected
    assert (dag.root / f"metrics/extract/{TEACHER}.json").read_text() == metrics


# --- refused ---------------------------------------------------------------------------------


def test_rows_of_another_tokenizer_are_refused_before_the_model_is_opened(dag: TinyDag) -> None:
    """The weights are not even there."""
    entry = dag.root / "artifacts/prepare/tokenizer.json"
    entry.write_text(json.dumps({"name": TEACHER, "probe": [1, 2, 3]}))
    (dag.teacher_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"'{TEACHER}' is not the one that made the rows any more"):
        dag.run("extract")
    assert dag.published("extract") == {}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def poison(file: Path) -> None:
    state = load_file(file)
    state["model.layers.6.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(state, file, metadata={"format": "pt"})


def poison_head(file: Path) -> None:
    state = load_file(file)
    state["lm_head.weight"][3, 5] = float("nan")
    save_file(state, file, metadata={"format": "pt"})


def exchange(file: Path) -> None:
    tiny_gpt2().save_pretrained(file.parent / "other")
    (file.parent / "other" / file.name).replace(file)


def pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


DAMAGES = [
    (cut, BadCheckpoint, "model.safetensors is damaged or cut short.*fetch it again"),
    (poison, NotFinite, "block 6 of LlamaForCausalLM.*mlp.down_proj.weight hold NaN"),
    (poison_head, NotFinite, "logits of LlamaForCausalLM are not finite"),
    (exchange, BadCheckpoint, "the configuration is of another model"),
    (pickle, BadCheckpoint, "only pickled weights .pytorch_model.bin."),
]


@pytest.mark.parametrize("engine", ["auto", "resident", "streamed"])
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_a_damaged_teacher_is_refused_and_nothing_is_published(
    damage, error: type, message: str, engine: str, dag: TinyDag
) -> None:
    damage(dag.teacher_folder / "model.safetensors")
    dag.set("extract", engine=engine)
    with pytest.raises(error, match=message):
        dag.run("extract")
    assert dag.published("extract") == {}
