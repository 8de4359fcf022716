"""Streaming that ends before its end: whose fault it was is said, and nothing stays behind."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.blocks import find_units
from modeling.checkpoint import BadCheckpoint, read_checkpoint
from modeling.streaming import NotFinite, Passage
from modeling.weights import Resident
from tests.causal_lms import tiny_model
from tests.modeling.passages import assert_same, batches_of, exhaust, finish, saved, streaming
from tests.tiny import REPOSITORY


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- what goes wrong -------------------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")
BLAMED = [
    ("model.layers.2.mlp.up_proj.weight", "block 2 of Llama.* its mlp.up_proj.weight hold NaN"),
    ("model.layers.0.input_layernorm.weight", "block 0 of .* its input_layernorm.weight hold"),
    ("model.embed_tokens.weight", "the embedding of Llama.* its weight hold NaN or infinity"),
]


def damage(folder: Path, name: str, value: float) -> None:
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[:64] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize(("name", "message"), BLAMED)
def test_weights_that_are_not_finite_are_blamed_by_name(
    name: str, message: str, value: float, tmp_path: Path
) -> None:
    model = saved("llama", tmp_path)
    damage(tmp_path, name, value)
    batch = {"input_ids": torch.arange(8)[None], "use_cache": False}
    with streaming(model, tmp_path, [batch]) as passage, pytest.raises(NotFinite, match=message):
        exhaust(passage)


def test_states_that_overflow_are_told_from_damaged_weights(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    damage(tmp_path, "model.layers.1.mlp.up_proj.weight", 3e38)
    with streaming(model, tmp_path, batches_of(model, [(1, 5)])) as passage:
        message = r"block 1 of .*weights are, so the states overflow in torch\.float32"
        with pytest.raises(NotFinite, match=message):
            exhaust(passage)


def test_a_file_that_is_cut_while_batches_pass_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    place = read_checkpoint(tmp_path).tensors["model.layers.3.mlp.up_proj.weight"]
    with streaming(model, tmp_path, batches_of(model, [(1, 5)])) as passage:
        with pytest.raises(BadCheckpoint, match=f"{place.file} has .* it was cut"):
            for _ in passage.run():
                os.truncate(place.file, place.offset)


CUT = """
import os, sys
from pathlib import Path
import torch
from modeling.answers import logits_of, read_answers
from modeling.checkpoint import BadCheckpoint
from tests.causal_lms import tiny_inputs, tiny_model
from tests.modeling.passages import exhaust, streaming
folder, when = Path(sys.argv[1]), sys.argv[2]
model = tiny_model("llama")
model.save_pretrained(folder)
file = folder / "model.safetensors"
with torch.no_grad(), streaming(model, folder, [tiny_inputs(model, 1, 5, seed=0)]) as passage:
    passage.weights.reader.get(0)
    try:
        if when == "before the embedding":
            os.truncate(file, 0)
        for arrival in passage.run():
            if (arrival.block, when) == (1, "before a block"):
                os.truncate(file, 0)
        os.truncate(file, 0)
        if when == "before the head":
            list(read_answers(passage, 4))
        logits_of(passage)(passage.forwards[0], torch.tensor([0]))
    except BadCheckpoint as error:
        print(error)
"""


@pytest.mark.parametrize(
    "when", ["before the embedding", "before a block", "before the head", "before all of the head"]
)
def test_a_file_that_is_cut_while_it_is_mapped_is_refused_rather_than_touched(
    when: str, tmp_path: Path
) -> None:
    """Touched, it ends the process with SIGBUS: so this is one of its own."""
    command = [sys.executable, "-c", CUT, str(tmp_path), when]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors has 0 bytes, and had" in done.stdout


# --- afterwards ------------------------------------------------------------------------------


def leave_at_once(passage: Passage) -> None:
    next(passage.run())


def leave_in_a_block(passage: Passage) -> None:
    for arrival in passage.run():
        if (arrival.block, arrival.batch) == (1, 0):
            break


def leave_between_blocks(passage: Passage) -> None:
    running = passage.run()
    while next(running).block < 2:
        pass
    running.close()


def raise_in_a_block(passage: Passage) -> None:
    with pytest.raises(ZeroDivisionError):
        for arrival in passage.run():
            _ = 1 / (2 - arrival.block)


def raise_in_the_model(passage: Passage) -> None:
    batch = {"input_ids": torch.tensor([[10**6]]), "use_cache": False}
    with pytest.raises(IndexError):
        exhaust(Passage(passage.model, passage.blocks, passage.weights, [batch]))


def leave_at_the_head(passage: Passage) -> None:
    exhaust(passage)
    next(passage.weights.head())


ENDS = [
    exhaust, leave_at_once, leave_in_a_block, leave_between_blocks, raise_in_a_block,
    raise_in_the_model, leave_at_the_head,
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_a_model_in_memory_works_as_usual_after_a_passage(end: Callable) -> None:
    model = tiny_model("llama")
    batches = batches_of(model, [(1, 5), (2, 9)])
    expected = [model(**batch).logits for batch in batches]
    for _ in range(3):
        end(Passage(model, find_units(model), Resident(model), batches))
        assert not any("forward" in vars(module) for module in model.modules())
        assert_same([model(**batch).logits for batch in batches], expected)


@pytest.mark.parametrize("end", ENDS)
def test_a_model_on_disk_is_streamed_as_usual_after_a_passage(
    end: Callable, tmp_path: Path
) -> None:
    model = saved("llama", tmp_path)
    batches = batches_of(model, [(1, 5), (2, 9)])
    with streaming(model, tmp_path, batches) as passage:
        for _ in range(3):
            end(Passage(passage.model, passage.blocks, passage.weights, batches))
            assert all(p.is_meta for block in passage.blocks for p in block.parameters())
        exhaust(passage)
        assert_same(finish(passage), [model(**batch).logits for batch in batches])
