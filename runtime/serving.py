"""Open a student with its skills within a tier, or refuse before anything is loaded.

    assistant = open_assistant(skills_in(Path("artifacts")), lookup("tiers", "pro"))
    for reply in assistant.reply(["What is 15 % of 62?"], sampling):
        ...

A tier has memory for some context and a largest rank (registry/tiers.yaml). Served are the skills
of capabilities whose own tier needs no more memory than that; what the router gives to the others
the student answers as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modeling.backends import compute_dtype, default_device
from modeling.loading import open_model, open_tokenizer
from modeling.router import open_router
from modeling.serving_memory import ServingNeed, require_free, require_tier, serving_need
from registry.catalog import lookup
from registry.records import Tier
from runtime.adapters.bank import AdapterBank
from runtime.assistant import Assistant
from runtime.generation.engine import Engine, Toolbox
from runtime.generation.products import packing_for
from runtime.prompt import request_edges

TAUGHT_BY = ("sft", "toolformer", "grpo")  # stages that teach skills, in their order
ROWS, ANSWER_TOKENS = 8, 256  # that a tier's memory is planned for


@dataclass(frozen=True)
class Skills:
    """Folders of a student, its router, and an adapter for each of some capabilities."""

    student: Path
    router: Path
    adapters: Mapping[str, Path]

    def within(self, tier: Tier) -> "Skills":
        """Those whose capability's tier needs no more memory than this one has."""
        fit = {
            name: folder
            for name, folder in self.adapters.items()
            if lookup("tiers", lookup("capabilities", name).tier).memory_gb <= tier.memory_gb
        }
        return Skills(self.student, self.router, fit)


def skills_in(artifacts: Path) -> Skills:
    """What the pipeline left: of each capability, the adapter of the last stage that taught it."""
    adapters: dict[str, Path] = {}
    for stage in TAUGHT_BY:
        for config in sorted((artifacts / stage).glob("*/adapter_config.json")):
            adapters[config.parent.name] = config.parent
    return Skills(artifacts / "distill" / "student", artifacts / "route", adapters)


def plan(
    skills: Skills, tier: Tier, rows: int = ROWS, answer_tokens: int = ANSWER_TOKENS
) -> ServingNeed:
    """What serving the skills takes at the tier's context, read from headers alone.

    Raises WillNotFit where that is more than the tier allows, or than this machine has free, and
    says what would fit; and what serving_need does, as ValueError for a model without keys and
    values (Mamba).
    """
    device = default_device()
    dtype = compute_dtype(device)
    need = serving_need(
        skills.student, dtype, context=tier.context, answer_tokens=answer_tokens, rows=rows,
        adapters=list(skills.adapters.values()), device=str(device),
        packing=packing_for(dtype, half_weights=True) if device.type == "cpu" else None,
    )  # fmt: skip
    return require_free(require_tier(need, tier))


def open_assistant(
    skills: Skills,
    tier: Tier,
    tools: Toolbox | None = None,
    rows: int = ROWS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Assistant:
    """Plan, refuse what does not fit, then load; raises what `plan` and the folders' readers do.

    rows: answers at once.  answer_tokens: of an answer at most; prompts get the rest of the tier's
    context. Raises ValueError where that leaves no room.
    """
    served = skills.within(tier)
    need = plan(served, tier, rows, answer_tokens)
    tokenizer = open_tokenizer(served.student)
    room = need.context - answer_tokens - sum(request_edges(tokenizer))
    if room < 1:
        raise ValueError(
            f"answer_tokens is {answer_tokens}, and with the template nothing is left of a context "
            f"of {need.context} tokens for a request; at most {answer_tokens + room - 1} fit"
        )
    model = open_model(served.student, default_device())
    bank = AdapterBank(model, budget_bytes=max(1, need.adapted))
    for name, folder in served.adapters.items():
        bank.add(name, folder)
    router = open_router(served.router, model.config.get_text_config().hidden_size)
    engine = Engine(model, tokenizer, tools, rows_at_once=rows, bank=bank, router=router)
    return Assistant(engine, most_tokens=room, most_own_tokens=answer_tokens)
