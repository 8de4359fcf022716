"""Staging: what goes to a device by way of pinned pieces arrives whole; GPU checks where one is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling import reading, staging
from modeling.blocks import find_units
from modeling.checkpoint import BadCheckpoint, Place, read_checkpoint
from modeling.reading import Reader
from modeling.skeleton import build_skeleton
from modeling.staging import Staging
from modeling.streaming import Passage
from modeling.weights import Streamed
from tests.coverage import whole_forward
from tests.modeling.passages import assert_same, batches_of, finish, saved

CPU, GPU = torch.device("cpu"), torch.device("cuda")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
every_device = pytest.mark.parametrize(
    "device", [CPU, pytest.param(GPU, marks=needs_gpu)], ids=["cpu", "cuda"]
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces a tensor, more than there are slots."""
    for module in (reading, staging):
        monkeypatch.setattr(module, "PIECE_BYTES", 1 << 14)


def parts_on_disk(folder: Path) -> dict[int, dict[str, Place]]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 301_111, "b": 70, "c": 500_000, "d": 123_457}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors")
    places = read_checkpoint(folder).tensors
    return {0: {"a": places["a"], "b": places["b"]}, 1: {"c": places["c"]}, 2: {"d": places["d"]}}


@every_device
def test_parts_arrive_as_they_are_on_disk_while_their_buffers_are_used_again(
    tmp_path: Path, device: torch.device
) -> None:
    parts = parts_on_disk(tmp_path)
    with Reader(parts) as plain, Reader(parts, Staging(device)) as staged:
        for part in [0, 1, 2] * 3:
            found, expected = staged.get(part), plain.get(part)
            staged.ahead((part + 1) % 3)
            assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
            assert all(tensor.device.type == device.type for tensor in found.values())
            staged.release(part)
            plain.release(part)
        assert staged.bytes_read >= plain.bytes_read > 0


@every_device
def test_a_file_that_became_shorter_is_told_where_its_part_is_asked_for(
    tmp_path: Path, device: torch.device
) -> None:
    parts = parts_on_disk(tmp_path)
    with Reader(parts, Staging(device)) as staged:
        staged.get(0)
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.truncate(parts[2]["d"].offset + 100)
        with pytest.raises(BadCheckpoint, match="ends"):
            staged.get(2)
        staged.release(0)
        assert len(staged.get(1)["c"]) == 500_000  # all slots came back


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_a_model_streamed_to_a_gpu_gives_what_it_gives_there_in_memory(
    family: str, tmp_path: Path
) -> None:
    with torch.no_grad():
        model = saved(family, tmp_path).to(GPU)
        shapes = [(2, 12), (1, 7)]
        batches = [{k: v.to(GPU) for k, v in b.items()} for b in batches_of(model, shapes)]
        states, logits = whole_forward(model, batches)
        checkpoint = read_checkpoint(tmp_path)
        skeleton = build_skeleton(type(model), model.config, checkpoint, torch.float32, GPU)
        weights = Streamed(skeleton, checkpoint)
        passage = Passage(skeleton.model, skeleton.blocks, weights, batches)
        for arrival in passage.run():
            if arrival.block >= 0:
                assert torch.equal(arrival.hidden, states[arrival.block, arrival.batch])
        assert_same(finish(passage), logits)
        weights.close()
        assert len(find_units(model)) == len(skeleton.blocks)
