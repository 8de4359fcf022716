"""Coverage: the architectures of transformers stream to the same bits, one and all."""

import pytest

from tests.causal_lms import MODEL_TYPES, REFUSALS
from tests.coverage import survey

USUAL = (
    "llama", "qwen3", "gemma2", "gpt2", "mixtral", "qwen3_moe", "mamba2", "jamba", "opt",
    "deepseek_v3",
)  # fmt: skip
UNUSUAL = {
    "gemma4_text": "its blocks share keys and values",
    "zaya": "a router's state goes from block to block",
    "hrm_text": "it comes to each block several times",
    "gpt_neo": "its blocks give more than a hidden state",
}
CANNOT_STREAM = {"qwen4_exp", "qwen4_exp_text"}  # loading looks at values


@pytest.mark.parametrize("model_type", USUAL)
def test_a_usual_architecture_streams_and_resumes_exactly(model_type: str) -> None:
    found = survey(model_type)
    assert (found.exact, found.resumed, found.remark) == (True, "exact", "")


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_one_whose_place_a_hidden_state_does_not_tell_streams_exactly_and_starts_anew(
    model_type: str,
) -> None:
    found = survey(model_type)
    assert (found.exact, found.resumed, found.remark) == (True, "from the start", "")


@pytest.mark.slow
def test_all_architectures_stream_exactly_but_those_that_are_known() -> None:
    found = {model_type: survey(model_type) for model_type in MODEL_TYPES}
    assert sum(finding.exact for finding in found.values()) >= 165
    assert not [f for f in found.values() if f.remark == "wrong when resumed"]
    inexact = {model_type for model_type, finding in found.items() if not finding.exact}
    assert inexact == CANNOT_STREAM | set(REFUSALS), [found[name] for name in inexact]
