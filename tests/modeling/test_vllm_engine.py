"""vLLM's answers: an adapter of its documented output, and its agreement with our own engine.

Its output is made by hand here, of known distributions, as vllm/logprobs.py
documents it; only the test marked `gpu` runs vLLM itself.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modeling.answers import Answers, read_answers
from modeling.backends import require, what_is_missing
from modeling.losses import TINY
from modeling.teacher import open_teacher
from modeling.vllm_engine import BadAnswer, as_targets, open_vllm

R, T, V, K = 3, 7, 41, 5


@dataclass
class Logprob:
    """vllm.logprobs.Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def entry(log_probs: Tensor, came: int, k: int) -> dict[int, Logprob]:
    """What append_logprobs_for_next_position makes: the token that came, then the top k."""
    top = log_probs.topk(k)
    rank = int((log_probs >= log_probs[came]).sum())
    pairs = [(came, log_probs[came], rank)]
    pairs += [(i, v, n + 1) for n, (i, v) in enumerate(zip(top.indices, top.values, strict=True))]
    return {int(token): Logprob(float(value), rank) for token, value, rank in pairs}


def outputs_of(rows: Tensor, logits: Tensor, k: int = K) -> list[SimpleNamespace]:
    """vllm.RequestOutput of each row, whose distributions are those of logits (R, T, V)."""
    outputs = []
    for row, scores in zip(rows.tolist(), logits.float().log_softmax(-1), strict=True):
        told = [entry(scores[t], row[t + 1], k) for t in range(len(row) - 1)]
        generated = int(scores[-1].argmax())
        completion = SimpleNamespace(
            token_ids=[generated], logprobs=[entry(scores[-1], generated, k)]
        )
        outputs.append(
            SimpleNamespace(
                prompt_token_ids=row, prompt_logprobs=[None, *told], outputs=[completion]
            )
        )
    return outputs


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(V, (R, T)), torch.randn(R, T, V) * 3


# --- the adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, K, V])
def test_targets_are_those_of_the_distributions(seed: int, k: int) -> None:
    rows, logits = example(seed)
    found = as_targets(outputs_of(rows, logits, k), rows, k)
    expected = Answers.of(logits.flatten(0, 1), k).targets()
    assert found.ids.shape == found.log_probs.shape == (R, T, k) and found.tail.shape == (R, T)
    assert (found.ids.dtype, found.log_probs.dtype) == (torch.int64, torch.float32)
    assert torch.equal(found.ids.flatten(0, 1), expected.ids)
    torch.testing.assert_close(found.log_probs.flatten(0, 1), expected.log_probs)
    torch.testing.assert_close(found.tail.flatten(), expected.tail, atol=2e-6, rtol=0)
    assert (found.tail >= TINY).all()


def test_the_token_that_came_is_left_out_unless_it_is_among_the_best() -> None:
    rows, logits = example()
    unlikely = logits.argmin(-1)
    rows[:, 1:] = unlikely[:, :-1]
    found = as_targets(outputs_of(rows, logits), rows, K)
    assert len(outputs_of(rows, logits)[0].prompt_logprobs[1]) == K + 1
    assert not (found.ids == unlikely[..., None]).any()
    rows[:, 1:] = logits.argmax(-1)[:, :-1]
    found = as_targets(outputs_of(rows, logits), rows, K)
    assert torch.equal(found.ids[..., 0], logits.argmax(-1))


def test_a_tie_with_the_last_of_the_best_keeps_k_of_them() -> None:
    rows, logits = example()
    logits[...] = 0.0
    found = as_targets(outputs_of(rows, logits), rows, K)
    assert (found.ids.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(found.tail, torch.full((R, T), 1 - K / V))


def shifted(outputs: list) -> None:
    outputs[1].prompt_logprobs = outputs[1].prompt_logprobs[1:]


def cached(outputs: list) -> None:
    outputs[2].prompt_logprobs[3] = None


def few(outputs: list) -> None:
    outputs[0].prompt_logprobs[2] = dict(list(outputs[0].prompt_logprobs[2].items())[:2])


def not_a_number(outputs: list) -> None:
    next(iter(outputs[0].outputs[0].logprobs[0].values())).logprob = float("nan")


def nothing(outputs: list) -> None:
    outputs[0].prompt_logprobs = None


REFUSED = [
    (shifted, "log-probabilities of 6 of 7 tokens"),
    (cached, "0 log-probabilities where 5 were asked for"),
    (few, "2 log-probabilities where 5"),
    (not_a_number, "or NaN"),
    (nothing, "log-probabilities of 0 of 7 tokens"),
    (list.reverse, "another order than the prompts'"),
    (list.pop, "2 outputs for 3 prompts"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_output_that_is_not_as_documented_is_refused(spoil, message: str) -> None:
    rows, logits = example()
    outputs = outputs_of(rows, logits)
    spoil(outputs)
    with pytest.raises(BadAnswer, match=message):
        as_targets(outputs, rows, K)


# --- opening ---------------------------------------------------------------------------------


class StandIn:
    """A package `vllm` that answers from a table of logits by token: (V, V)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.asked: list[list[int]] = []
        self.SamplingParams = lambda **options: SimpleNamespace(**options)

    def LLM(self, **options) -> "StandIn":  # noqa: N802
        self.options = options
        return self

    def generate(self, prompts: list[dict], sampling: SimpleNamespace, use_tqdm: bool) -> list:
        self.sampling = sampling
        rows = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts])
        self.asked += rows.tolist()
        return outputs_of(rows, self.logits[rows], sampling.prompt_logprobs)


def test_a_model_is_opened_for_prompts_of_just_this_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vllm = StandIn(torch.randn(V, V) * 3)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    rows, _ = example()
    found = open_vllm(tmp_path, K, batch_rows=2, row_tokens=T).answers(rows)
    expected = Answers.of(vllm.logits[rows].flatten(0, 1), K).targets()
    assert torch.equal(found.ids.flatten(0, 1), expected.ids)
    options = vllm.options
    assert options["model"] == str(tmp_path) and options["dtype"] == "bfloat16"
    assert options["max_model_len"] == T + 1 and options["max_logprobs"] == K
    assert options["max_num_batched_tokens"] >= max(options["max_model_len"], 2 * T)
    assert options["max_num_seqs"] <= options["max_num_batched_tokens"]
    assert not options["enable_prefix_caching"] and options["logprobs_mode"] == "raw_logprobs"
    assert vllm.sampling.max_tokens == 1 and vllm.sampling.logprobs == K


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="the extraction needs vllm; .*CUDA GPU.*pip install 'vllm"
    ):
        require("vllm", "the extraction")


# --- vLLM itself -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(what_is_missing("vllm")), reason="; ".join(what_is_missing("vllm")))
@torch.no_grad()
def test_vllm_agrees_with_the_model_in_memory(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    rows = torch.randint(512, (6, 48))
    found = open_vllm(tmp_path, 16, batch_rows=4, row_tokens=48).answers(rows)
    passage = (teacher := open_teacher(tmp_path, "resident", rows.numel(), rows.numel())).passage(
        [rows]
    )
    list(passage.run())
    expected = next(read_answers(passage, 16)).targets()
    teacher.close()
    likeliest = found.ids[..., 0].flatten() == expected.ids[:, 0]
    assert likeliest.double().mean() > 0.95  # bfloat16 logits tie
    difference = (found.log_probs.flatten(0, 1) - expected.log_probs).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.3
    assert (found.tail.flatten() - expected.tail).abs().max() < 0.05
