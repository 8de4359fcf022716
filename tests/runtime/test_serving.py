"""A student with its skills opens within a tier, or is refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runtime.serving
from modeling.memory import WillNotFit
from modeling.router import Router, RouterShape, save_router
from registry.catalog import lookup
from runtime.generation.answers import Sampling
from runtime.prompt import request_edges
from runtime.serving import Skills, open_assistant, plan, skills_in
from tests.runtime.adapting import adapter_folder
from tests.runtime.conversing import letters
from tests.tiny import tiny_llama

GREEDY = Sampling(temperature=0, top_p=1, max_own_tokens=4, max_calls=0, seed=0)
CORE, PRO = (replace(lookup("tiers", name), context=128) for name in ("core", "pro"))
SMALL = {"rows": 2, "answer_tokens": 8}
LEARNT = {"sft": ("tools", "dialogue", "docs"), "grpo": ("tools",)}  # by the stage that taught it


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """What the pipeline leaves: a student, a router that always says tools, adapters."""
    root = tmp_path_factory.mktemp("artifacts")
    model = tiny_llama(blocks=2)
    model.save_pretrained(root / "distill/student")
    letters().save_pretrained(root / "distill/student")
    for stage, names in LEARNT.items():
        for seed, name in enumerate(names):
            adapter_folder(lambda: tiny_llama(blocks=2), root / stage / name, seed)
    shape = RouterShape(("tools", "docs"), (1,), model.config.hidden_size, 4)
    router = Router(shape)
    with torch.no_grad():
        router.outer.weight.zero_()
        router.outer.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    save_router(router, root / "route")
    return root


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_) -> None:
        raise AssertionError("the student was loaded")

    monkeypatch.setattr(runtime.serving, "open_model", refuse)


def test_a_skill_is_that_of_the_last_stage_that_taught_it(artifacts: Path) -> None:
    found = skills_in(artifacts)
    assert found.adapters == {
        "tools": artifacts / "grpo/tools",
        "dialogue": artifacts / "sft/dialogue",
        "docs": artifacts / "sft/docs",
    }
    assert (found.student, found.router) == (artifacts / "distill/student", artifacts / "route")


def test_it_opens_and_routes(artifacts: Path) -> None:
    assistant = open_assistant(skills_in(artifacts), PRO, **SMALL)
    [reply] = assistant.reply(["6*7?"], GREEDY)
    assert reply.capability == "tools"
    assert (
        reply.answer.tokens
        != open_assistant(
            Skills(artifacts / "distill/student", artifacts / "route", {}), PRO, **SMALL
        )
        .reply(["6*7?"], GREEDY)[0]
        .answer.tokens
    )


def test_a_smaller_tier_serves_fewer_skills(artifacts: Path) -> None:
    assert set(skills_in(artifacts).within(CORE).adapters) == {"dialogue", "docs"}
    assert set(skills_in(artifacts).within(PRO).adapters) == {"tools", "dialogue", "docs"}


def test_a_request_is_cut_to_what_memory_was_planned_for(artifacts: Path) -> None:
    assistant = open_assistant(skills_in(artifacts), PRO, **SMALL)
    [reply] = assistant.reply(["7" * 500], GREEDY)
    [short] = assistant.reply(["7"], GREEDY)
    assert reply.cut and not short.cut
    edges = sum(request_edges(letters()))
    assert edges + assistant._room(GREEDY) + SMALL["answer_tokens"] == PRO.context
    with pytest.raises(ValueError, match="9, and memory was planned for answers of 8 tokens"):
        assistant.reply(["7"], replace(GREEDY, max_own_tokens=9))


def test_an_answer_that_leaves_no_room_for_a_request_is_refused(
    artifacts: Path, nothing_loads: None
) -> None:
    with pytest.raises(ValueError, match=r"answer_tokens is 128, .* context of 128 tokens"):
        open_assistant(skills_in(artifacts), PRO, rows=1, answer_tokens=128)


def test_too_large_a_plan_is_refused_before_anything_is_loaded(
    artifacts: Path, nothing_loads: None
) -> None:
    with pytest.raises(WillNotFit, match=r"tier 'pro' has .*(What|Nothing) would fit"):
        open_assistant(skills_in(artifacts), replace(PRO, memory_gb=0), **SMALL)
    with pytest.raises(WillNotFit, match="has rank 4; tier 'pro' allows 2"):
        open_assistant(skills_in(artifacts), replace(PRO, max_rank=2), **SMALL)


def test_the_plan_counts_each_adapter(artifacts: Path) -> None:
    skills = skills_in(artifacts)
    one = replace(skills, adapters={"tools": skills.adapters["tools"]})
    assert plan(skills, PRO, **SMALL).adapted == 3 * plan(one, PRO, **SMALL).adapted > 0
