"""A teacher's most likely next tokens by vLLM, where that is installed and a GPU is there.

vLLM keeps a GPU busier than one forward after the other does, and gives answers alone: no hidden
states, so neither a prefix nor anchors. What its documentation says of log-probabilities, and what
is made of it:

    prompt_logprobs  an entry a token of the prompt: the distribution that this token was one of, so
                     entry t + 1 tells position t's next token. The first is None. The last position
                     is told by the one token that is generated (`logprobs`).
    an entry         token id -> Logprob. The token that really came is put before the k most likely
                     and may not be one of them: k or k + 1 tokens, of which the k best are kept.
    raw_logprobs     before temperature and penalties; of all the vocabulary, in float32

The mass of all others is 1 less the sum, which cancels: below about 1e-6 it is rounding. Logits are
bfloat16 by other kernels than ours, batched as vLLM likes: near to the other engines' answers, not
equal, and not to the bit the same when an extraction is interrupted. Prefixes are not cached
(vLLM would have to compute them again for their log-probabilities), and a step takes one batch of
tokens, because logits of the whole vocabulary stand beside what vLLM reserves memory for.

Not covered: several GPUs, models that vLLM loads only with code of their own.

Letters: R rows, T tokens a row, K tokens kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.losses import TINY, SparseTargets


class BadAnswer(ValueError):
    """vLLM's output is not what it is documented to be; the message says in what."""


@dataclass(frozen=True)
class VllmTeacher:
    """A model that vLLM has open."""

    llm: Any  # vllm.LLM
    sampling: Any  # vllm.SamplingParams
    top_k: int

    def answers(self, rows: Tensor) -> SparseTargets:
        """The next tokens of all positions of rows (R, T): targets of (R, T). Raises BadAnswer."""
        prompts = [{"prompt_token_ids": row} for row in rows.tolist()]  # vllm.TokensPrompt
        outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        return as_targets(outputs, rows, self.top_k)


def open_vllm(folder: Path, top_k: int, batch_rows: int, row_tokens: int) -> VllmTeacher:
    """Open the model in a folder in bfloat16 on the GPU; needs vLLM 0.10 or later."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,  # token ids in, token ids out
        max_model_len=row_tokens + 1,  # and the one that is generated
        max_num_seqs=batch_rows,
        max_num_batched_tokens=batch_rows * (row_tokens + 1),
        max_logprobs=top_k,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        enforce_eager=True,  # graphs are for generating
        seed=0,
    )
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=top_k,
        prompt_logprobs=top_k,
    )  # fmt: skip
    return VllmTeacher(llm, sampling, top_k)


def as_targets(outputs: Sequence[Any], rows: Tensor, top_k: int) -> SparseTargets:
    """What vLLM gave for rows (R, T), as targets of (R, T) positions; a RequestOutput a row.

    Raises BadAnswer for outputs of other rows, and where a log-probability is missing or NaN.
    """
    if len(outputs) != len(rows):
        raise BadAnswer(f"vLLM gave {len(outputs)} outputs for {len(rows)} prompts")
    ids, log_probs = [], []
    for row, output in zip(rows.tolist(), outputs, strict=True):
        if list(output.prompt_token_ids) != row:
            raise BadAnswer("vLLM gave its outputs in another order than the prompts'")
        best = [_best(entry, top_k) for entry in _entries(output)]
        ids.append([[token for token, _ in position] for position in best])
        log_probs.append([[value for _, value in position] for position in best])
    found = torch.tensor(log_probs, dtype=torch.float64)  # (R, T, K)
    tail = (1 - found.exp().sum(-1)).clamp_min(TINY)
    return SparseTargets(torch.tensor(ids), found.float(), tail.float())


def _entries(output: Any) -> list[Mapping[int, Any] | None]:
    """Of each position of a row, the entry that tells its next token."""
    told = list(output.prompt_logprobs or [])
    if len(told) != len(output.prompt_token_ids):
        raise BadAnswer(
            f"vLLM gave log-probabilities of {len(told)} of {len(output.prompt_token_ids)} tokens "
            "of a prompt"
        )
    return [*told[1:], output.outputs[0].logprobs[0]]


def _best(entry: Mapping[int, Any] | None, top_k: int) -> list[tuple[int, float]]:
    """The K most likely tokens of one position and their log-probabilities, the best first."""
    tokens = [(token, found.logprob) for token, found in (entry or {}).items()]
    if len(tokens) < top_k or any(math.isnan(value) for _, value in tokens):
        raise BadAnswer(
            f"vLLM gave {len(tokens)} log-probabilities where {top_k} were asked for, or NaN"
        )
    return sorted(tokens, key=lambda pair: -pair[1])[:top_k]
