"""A teacher is streamed in the type that the machine computes in, whatever it is stored in."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling.backends import compute_dtype
from tests.coverage import whole_forward
from tests.modeling.passages import assert_same, batches_of, finish, saved, streaming


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2", "mamba"])
def test_what_is_stored_in_bfloat16_is_streamed_in_float32_as_if_it_were_in_memory(
    family: str, tmp_path: Path
) -> None:
    """As on a CPU without units for bfloat16; no copy of the embedding is made."""
    kind = saved(family, tmp_path)
    kind.to(torch.bfloat16).save_pretrained(tmp_path)
    model = type(kind).from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32).eval()
    batches = batches_of(model, [(2, 12), (1, 7)])
    with torch.no_grad(), streaming(model, tmp_path, batches) as passage:
        states, logits = whole_forward(model, batches)
        for arrival in passage.run():
            if arrival.block >= 0:
                assert torch.equal(arrival.hidden, states[arrival.block, arrival.batch])
        assert_same(finish(passage), logits)
        assert passage.model.dtype == torch.float32
        embedding = passage.model.get_input_embeddings()
        if type(embedding) is nn.Embedding:
            assert embedding.weight.untyped_storage().nbytes() == 4


def test_an_embedding_that_stayed_on_disk_is_nan_for_whoever_takes_its_weight(
    tmp_path: Path,
) -> None:
    model = saved("llama", tmp_path)
    with streaming(model, tmp_path, batches_of(model, [(1, 4)])) as passage:
        embedding = passage.model.get_input_embeddings()
        assert embedding.weight.isnan().all()
        assert embedding.weight.shape == model.get_input_embeddings().weight.shape
        ids = torch.tensor([[3, 1]])
        assert torch.equal(embedding(ids), model.get_input_embeddings()(ids))


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "arm_bf16"])
@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_is_computed_in_where_there_are_units_for_it(
    feature: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"avx2": True, "cpu_name": "a CPU", feature: there}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    wanted = torch.bfloat16 if there else torch.float32
    assert compute_dtype(torch.device("cpu")) is wanted
