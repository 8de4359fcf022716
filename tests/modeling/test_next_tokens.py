"""The log-probability of the token that follows is the whole model's, in pieces or not."""

from pathlib import Path

import pytest
import torch

import modeling.answers
import modeling.weights
from modeling.answers import read_answers
from modeling.next_tokens import read_followed
from tests.modeling.passages import batches_of, exhaust, saved, streaming

SHAPES = [(2, 9), (1, 5)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("at_once", [4, 512])
@torch.no_grad()
def test_it_equals_the_whole_models(
    family: str, piece: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling.answers, "TOKENS", at_once)
    model = saved(family, tmp_path)
    monkeypatch.setattr(modeling.weights, "PIECE_BYTES", piece * model.config.hidden_size * 4)
    batches = batches_of(model, SHAPES)
    tokens = [batch["input_ids"] for batch in batches]
    with streaming(model, tmp_path, batches) as passage:
        exhaust(passage)
        found = list(read_followed(passage, 5, tokens))
    with streaming(model, tmp_path, batches) as passage:
        exhaust(passage)
        plain = list(read_answers(passage, 5))
    for followed, answers, batch in zip(found, plain, batches, strict=True):
        assert torch.equal(followed.answers.ids, answers.ids)
        assert torch.equal(followed.answers.rest, answers.rest)
        log_probs = model(**batch).logits.log_softmax(-1)[:, :-1]
        wanted = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        shape = batch["input_ids"].shape
        log_prob = followed.log_prob().view(shape)[:, :-1]
        torch.testing.assert_close(log_prob, wanted, atol=1e-4, rtol=1e-4)
