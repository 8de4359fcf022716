"""Losses and gradients of sft and grpo are TRL's, where TRL is installed.

NANOFOUNDRY_TRL_PYTHON=/path/to/python     an interpreter with trl and this project's packages
"""

import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modeling.fast_path import fast_path
from modeling.lora import Adapted, AdapterShape, adapt, open_adapted, save_adapter, trainable
from stages.grpo.policy import Policy, Trace, accumulate
from stages.learning.finetuning import rows_loss
from stages.learning.supervision import Example, lay_out, share
from tests.modeling.test_export import VOCABULARY, saved
from tests.modeling.vocabularies import trained_bpe
from tests.tiny import REPOSITORY, tiny_llama

TRL = os.environ.get("NANOFOUNDRY_TRL_PYTHON")
LENGTHS = ((5, 7), (5, 3), (9, 6), (9, 8))  # tokens of each prompt and its answer
INSERTED = ((), (), (1, 2, 3), (5, 6, 7))  # which tokens of the answer a tool wrote
ADVANTAGES = (1.5, -0.5, 0.7, -1.7)
PAD, MOST_OWN, CLIP, MOST_TOKENS = 0, 16, 0.2, 64
SETTINGS = [
    {"loss_type": loss, "beta": beta, "temperature": temperature}
    for loss in ("grpo", "dr_grpo", "dapo")
    for beta, temperature in ((0.0, 1.0), (0.3, 0.7))
]


@dataclass(frozen=True)
class Theirs:
    """What TRL made of the same: a loss a setting and that of SFT, and the adapters' gradients."""

    folder: Path  # of model and adapter
    losses: list[float]
    gradients: list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    if not TRL:
        pytest.skip("NANOFOUNDRY_TRL_PYTHON names no interpreter with trl")
    if subprocess.run([TRL, "-Ic", "import trl"], capture_output=True, check=False).returncode:
        pytest.skip(f"{TRL} cannot import trl")
    folder = tmp_path_factory.mktemp("trl")
    write_model(folder)
    settings = [
        {**setting, "epsilon": CLIP, "max_completion_length": MOST_OWN} for setting in SETTINGS
    ]
    (folder / "settings.json").write_text(json.dumps(settings))
    save_file(trl_batch(folder), folder / "batch.safetensors")
    script = Path(__file__).with_name("trl_losses.py")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [TRL, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = json.loads((folder / "losses.json").read_text())
    gradients: list[dict[str, Tensor]] = [{} for _ in losses]
    for place, gradient in load_file(folder / "gradients.safetensors").items():
        number, _, name = place.partition(".")
        gradients[int(number)][name] = gradient
    return Theirs(folder, losses, gradients)


def write_model(folder: Path) -> None:
    """A model, and an adapter of it both of whose factors have a gradient."""
    model = saved_model(folder)
    adapted = adapt(model, AdapterShape(4, 8.0, "lora"), 0, folder / "start")
    torch.manual_seed(1)
    for name, parameter in trainable(adapted):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, folder / "adapter", folder / "start")


def saved_model(folder: Path):
    model = tiny_llama(vocab=VOCABULARY)
    saved(model, trained_bpe(VOCABULARY), folder / "model")
    return model


def opened(folder: Path) -> Adapted:
    return open_adapted(tiny_llama(vocab=VOCABULARY), folder / "adapter", trains=True)


def traces(policy: Policy) -> list[Trace]:
    """Answers; old and reference are far enough from the policy to clip some of the ratios."""
    torch.manual_seed(2)
    found = []
    prompts = {asked: torch.randint(1, VOCABULARY, (asked,)).tolist() for asked, _ in LENGTHS}
    for (asked, said), inserted, advantage in zip(LENGTHS, INSERTED, ADVANTAGES, strict=True):
        tokens = prompts[asked] + torch.randint(1, VOCABULARY, (said,)).tolist()
        own = (place not in inserted for place in range(said))
        example = Example(tuple(tokens), (False,) * asked + tuple(own))
        found.append(Trace(example, advantage))
    for trace in found:
        with torch.no_grad():
            now = policy.log_probs([trace])[0]
        trace.old = now + 0.3 * torch.randn(now.shape)
        trace.reference = now + 0.3 * torch.randn(now.shape)
    return found


def policy_of(folder: Path, temperature: float) -> Policy:
    return Policy.of(opened(folder), PAD, MOST_TOKENS, temperature)


def trl_batch(folder: Path) -> dict[str, Tensor]:
    """The same traces as TRL lays them out: prompts to the right, answers to the left."""
    tensors: dict[str, Tensor] = {}
    for number, setting in enumerate(SETTINGS):
        found = traces(policy_of(folder, setting["temperature"]))
        tensors[f"{number}.old_per_token_logps"] = spread(found, "old")
        tensors[f"{number}.ref_per_token_logps"] = spread(found, "reference")
    rows = [torch.tensor(trace.example.tokens) for trace in found]
    counted = [torch.tensor(trace.example.counted) for trace in found]
    asked = [length for length, _ in LENGTHS]
    prompts = [row[:length] for row, length in zip(rows, asked, strict=True)]
    answers = [row[length:] for row, length in zip(rows, asked, strict=True)]
    own = [row[length:].long() for row, length in zip(counted, asked, strict=True)]
    labels = [torch.where(c, row, -100) for c, row in zip(counted, rows, strict=True)]
    return tensors | {
        "prompt_ids": pad_sequence(prompts, True, PAD, "left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left"),
        "completion_ids": pad_sequence(answers, True, PAD),
        "completion_mask": pad_sequence([torch.ones_like(a) for a in answers], True, 0),
        "tool_mask": pad_sequence(own, True, 1),
        "advantages": torch.tensor(ADVANTAGES),
        "sft.input_ids": pad_sequence(rows, True, PAD),
        "sft.attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0),
        "sft.labels": pad_sequence(labels, True, -100),
    }


def spread(found: list[Trace], name: str) -> Tensor:
    """Numbers of own tokens at their places in the answers, (answers, longest)."""
    placed = []
    for trace, (asked, said) in zip(found, LENGTHS, strict=True):
        row = torch.zeros(said)
        row[torch.tensor(trace.example.counted[asked:])] = getattr(trace, name)
        placed.append(row)
    return pad_sequence(placed, True, 0)


def assert_gradients(adapted: Adapted, theirs: dict[str, Tensor]) -> None:
    named = trainable(adapted)
    assert {name for name, _ in named} == theirs.keys()
    for name, parameter in named:
        torch.testing.assert_close(
            parameter.grad,
            theirs[name],
            rtol=1e-3,
            atol=1e-5,
            msg=lambda said, n=name: f"{n} {said}",
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(SETTINGS)), ids=lambda n: str(list(SETTINGS[n].values()))
)
def test_the_loss_of_grpo_and_its_gradients_are_trl_s(theirs: Theirs, number: int) -> None:
    setting = SETTINGS[number]
    policy = policy_of(theirs.folder, setting["temperature"])
    found = traces(policy)
    seen = accumulate(policy, found, setting["loss_type"], CLIP, setting["beta"], MOST_OWN)
    assert seen["clipped"] > 0.1
    assert seen["loss"] == pytest.approx(theirs.losses[number], rel=1e-5, abs=1e-6)
    assert_gradients(policy.adapted, theirs.gradients[number])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_of_sft_and_its_gradients_are_trl_s(
    theirs: Theirs, layout: str, fast: bool
) -> None:
    policy = policy_of(theirs.folder, 1.0)
    examples = [trace.example for trace in traces(policy)]
    counted = sum(sum(example.counted) for example in examples)
    laid_out = lay_out(examples, PAD, MOST_TOKENS, layout == "packed")
    loss = 0.0
    with fast_path(policy.model, print) if fast else nullcontext():
        for rows in [share(examples)] if layout == "shared" else laid_out:
            part = rows_loss(policy.model, rows) / counted
            part.backward()
            loss += part.item()
    assert loss == pytest.approx(theirs.losses[-1], rel=1e-5)
    assert_gradients(policy.adapted, theirs.gradients[-1])
