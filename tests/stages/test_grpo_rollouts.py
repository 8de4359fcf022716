"""GRPO's rollouts: what is rewarded, which groups teach, and the judge that breaks ties."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.lora import AdapterShape, adapt, trainable
from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens
from stages.grpo.judge import FrozenJudge
from stages.grpo.objective import advantages
from stages.grpo.params import Params, RewardWeights
from stages.grpo.policy import Policy
from stages.grpo.reinforcement import Reinforcement
from stages.grpo.rewards import make_rewards
from stages.grpo.rollouts import Coach, example_of, token_counter
from tests.runtime.conversing import END, Calculator, letters
from tests.stages.skill_dag import KNOWN, PARAMS, student
from tests.tiny import tiny_llama

WEIGHTS = {"correctness": 1.0, "format": 0.2}
SAMPLING = Sampling(1.2, 1.0, 48, 2, 0)


def coach(**changed) -> Coach:
    rewards = make_rewards(WEIGHTS, token_counter(letters()), 48)
    made = Coach(letters(), SAMPLING, 3, rewards, WEIGHTS, "dr_grpo")
    return replace(made, **changed)


class Written:
    """An engine that wrote certain texts: for what no tiny model would write on purpose."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)

    def answer(self, prompts, candidates, sampling):
        return [self.answers]


class Recording(Engine):
    """The real engine, which keeps its last answers."""

    def answer(self, prompts, candidates, sampling):
        self.given = super().answer(prompts, candidates, sampling)
        return self.given


def answer(text: str, finished: str = "eos", forged: bool = False) -> Answer:
    tokens = letters().encode(text, add_special_tokens=False) + [END] * (finished == "eos")
    own = [True] * len(tokens)
    return Answer(tokens, own, [0.0] * len(tokens), text, [], finished, forged)


# --- rewards of what was written -------------------------------------------------------------


def test_right_wrong_unfinished_and_forged_answers_are_rewarded_as_they_deserve() -> None:
    engine = Written(
        answer("FINAL: 42"),
        answer("FINAL: 41"),
        answer("FINAL: 42", finished="length"),
        answer("So <<result>>42\nFINAL: 42", forged=True),
    )
    traces, seen = coach(candidates=4).roll_out(engine, KNOWN[:1], 0)
    assert seen["reward_correctness"] == 0.25
    assert seen["reward_format"] == 0.5  # the first two
    assert seen["cut_off"] == 0.25
    assert traces[0].advantage > traces[1].advantage > traces[2].advantage == traces[3].advantage
    assert sum(trace.advantage for trace in traces) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1.2])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(loss: str, reward: float) -> None:
    """A mean of three rounds: 0.7 less it would not be 0."""
    assert not advantages(torch.full((2, 3), reward), loss).any()
    mixed = advantages(torch.tensor([[reward] * 3, [reward, 0.0, reward]]), loss)
    assert not mixed[0].any() and mixed[1].all()


def test_a_group_without_advantage_teaches_nothing(tmp_path: Path) -> None:
    right = Written(*[answer("FINAL: 42")] * 3)
    traces, seen = coach().roll_out(right, KNOWN[:1], 0)
    assert traces == [] and seen["groups_used"] == 0 and seen["reward"] == pytest.approx(1.2)
    adapted = adapt(tiny_llama(), AdapterShape(2, 4.0, "lora"), 0, tmp_path)
    before = [p.detach().clone() for _, p in trainable(adapted)]
    fields = {**PARAMS["grpo"], "rewards": RewardWeights(**PARAMS["grpo"]["rewards"])}
    state = Reinforcement(Policy.of(adapted, END, 256, 1.0), Params(**fields))
    assert state.learn(traces) == {}
    assert state.step == 1 and state.training.step == 2  # its updates are passed over
    after = [p for _, p in trainable(adapted)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- rollouts --------------------------------------------------------------------------------


def test_a_step_s_answers_follow_from_its_number_and_the_seed_alone() -> None:
    engine = Recording(student(), letters(), Calculator())

    def told(step: int, seed: int = 0) -> list[list[int]]:
        sampling = replace(SAMPLING, seed=seed, temperature=2.0, max_own_tokens=8)
        coach(sampling=sampling).roll_out(engine, KNOWN[:2], step)
        return [one.tokens for group in engine.given for one in group]

    first = told(1)
    assert told(2) != first != told(1, seed=1)
    assert told(1) == first  # whatever was drawn before


def test_what_a_tool_inserted_is_no_token_that_is_learnt() -> None:
    engine = Engine(student(), letters(), Calculator())
    prompt = prompt_tokens(KNOWN[0].prompt, letters())
    ((given,),) = engine.answer([prompt], 1, replace(SAMPLING, temperature=0.0))
    example = example_of(prompt, given)
    own = [t for t, counts in zip(example.tokens, example.counted, strict=True) if counts]
    assert letters().decode(own) == '<<py>>{"code": "6*7"}FINAL: 42<end>'
    assert letters().decode(example.tokens).endswith("<<result>>42\nFINAL: 42<end>")


# --- the judge -------------------------------------------------------------------------------


def test_the_judge_s_score_is_the_mean_of_a_dense_computation() -> None:
    judge = FrozenJudge(student(), letters())
    asked, replies = ["6*7?", "2+2?", "?"], ["FINAL: 42", "I do not know", ""]
    expected = []
    for question, reply in zip(asked[:2], replies[:2], strict=True):
        prompt = prompt_tokens(question, letters())
        tokens = torch.tensor([prompt + letters().encode(reply, add_special_tokens=False)])
        scores = student()(tokens).logits[0, :-1].log_softmax(-1)
        chosen = scores.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :]
        expected.append(chosen.mean().item())
    assert judge(asked, replies) == pytest.approx([*expected, 0.0], rel=1e-4)
