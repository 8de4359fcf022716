"""Supervised fine-tuning: teach the student skills by example, a low-rank adapter each.

Steps, for each capability:
  1. put a new adapter on the student (modeling/lora.py), and a mini mixture of experts if it is
     asked for (modeling/moe.py)
  2. train it on the capability's conversations, and on some general text against forgetting, with
     the own loop (stages/learning/finetuning.py), TRL (trl_trainer.py) or unsloth
     (unsloth_process.py)
  3. measure, on what was never trained on: the loss of conversations from unseen templates, the
     perplexity of general text and the drift of the blocks, before and after
  4. refuse an adapter that has forgotten too much

reads    prepare   conversations; training and held-out rows of general text
         profile   subspaces, to measure drift in
         distill   the student
writes   CAPABILITY/    a PEFT adapter of the student, its experts beside it
         sft.json       facts and figures of each
"""

import json
from dataclasses import asdict

from stages.contract import Job, Metrics, Stage
from stages.sft.params import OWN, UNSLOTH, Capability, Params, check_among, check_trainer

BATCH_ROWS = 4  # of general text, where it is only measured


def run(params: Params, job: Job) -> Metrics:
    """Teach one capability after the other; see the module's steps."""
    check_trainer(params)
    metrics: Metrics = {}
    facts = {}
    for capability in params.capabilities:
        found = teach(capability, params, job)
        facts[capability.name] = found
        metrics |= {f"{capability.name}.{key}": value for key, value in flatten(found).items()}
    (job.output / "sft.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return metrics


def teach(capability: Capability, params: Params, job: Job) -> dict:
    """Train, measure and write one adapter; gives what was measured."""
    from modeling.lora import AdapterShape, adapt, merged, trainable
    from modeling.moe import ExpertsShape, add_experts
    from modeling.skills import save_skill
    from stages.learning.finetuning import mean_loss
    from stages.learning.student import open_student
    from stages.measuring.forgetting import compare, require_kept, row_losses

    student = open_student(job.input("distill"), job.inputs("profile"), job.input("prepare"))
    lesson, heldout = read_lesson(capability, params, job, student.tokenizer)
    general = student.heldout(params.general_text, params.heldout_rows)
    before = {
        "loss": mean_loss(student.model, lesson, heldout),
        "rows": row_losses(student.model, general, BATCH_ROWS),
    }
    shape = AdapterShape(
        params.rank, params.alpha, params.variant, capability.targets, capability.last_blocks
    )
    start = job.folder / "start" / capability.name
    adapted = adapt(student.model, shape, params.seed, start)
    if capability.experts is not None:
        some = lesson.general[:BATCH_ROWS]
        add_experts(student.model, ExpertsShape(**asdict(capability.experts)), some, params.seed)
    rollbacks = train(adapted, lesson, params, job, capability.name, student.tokenizer)
    with merged(adapted) as model:
        forgetting = compare(before["rows"], row_losses(model, general, BATCH_ROWS))
        drift = student.drift(model, general[:BATCH_ROWS])
        after = mean_loss(model, lesson, heldout)
    job.say(f"{capability.name}: perplexity of {params.general_text} {forgetting} times before")
    require_kept(forgetting, params.forgetting, f"adapter '{capability.name}'")
    save_skill(adapted, job.output / capability.name, start)
    return {
        "parameters": sum(p.numel() for _, p in trainable(adapted)),
        "conversations": len(lesson.examples),
        "heldout_loss_before": before["loss"],
        "heldout_loss": after,
        "general": asdict(forgetting),
        "drift": drift,
        "rollbacks": [asdict(back) for back in rollbacks],
    }


def train(adapted, lesson, params: Params, job: Job, phase: str, tokenizer):
    """Train the adapter, in place, with the trainer that is asked for; gives the rollbacks."""
    from stages.learning.finetuning import finetune

    if params.trainer == OWN:
        return finetune(adapted, lesson, job, phase)
    from stages.sft.trl_trainer import finetune_with_trl
    from stages.sft.unsloth_process import train_with_unsloth

    if params.trainer == UNSLOTH:
        train_with_unsloth(adapted, lesson, job, phase)  # finished then; only taken over below
    return finetune_with_trl(adapted, lesson, job, phase, tokenizer)


def read_lesson(capability: Capability, params: Params, job: Job, tokenizer):
    """What is taught, and as many conversations of unseen templates as validation has, which are
    only measured on."""
    import torch

    from stages.formats.conversations import read_conversations
    from stages.formats.tokens import read_all_rows
    from stages.learning.finetuning import Lesson
    from stages.learning.supervision import encode

    prepared = job.input("prepare")
    known, unseen = (
        [
            encode(conversation, tokenizer)
            for name in capability.conversations
            for conversation in read_conversations(prepared, name, split)
        ]
        for split in ("train", "heldout")
    )
    fits = [example for example in known if len(example) <= params.most_tokens]
    if len(fits) < len(known):
        job.say(
            f"{capability.name}: {len(known) - len(fits)} of {len(known)} conversations are longer "
            f"than most_tokens ({params.most_tokens}) and left out"
        )
    kept_out = params.validation_conversations
    if len(fits) <= kept_out:
        raise ValueError(
            f"capability '{capability.name}' has {len(fits)} conversations of at most "
            f"{params.most_tokens} tokens, and validation keeps {kept_out} of them; add data sets "
            "or lower 'validation_conversations'"
        )
    general = torch.from_numpy(read_all_rows(prepared, "train", params.seed))
    course = params.course_of(capability)
    lesson = Lesson(course, fits[kept_out:], fits[:kept_out], general, tokenizer.eos_token_id)
    return lesson, unseen[:kept_out]


def flatten(found: dict) -> Metrics:
    """The numbers of one capability, flat."""
    general = {f"perplexity_ratio{end}": found["general"][key] for end, key in ENDS.items()}
    return {
        "parameters": found["parameters"],
        "heldout_loss_before": round(found["heldout_loss_before"], 6),
        "heldout_loss": round(found["heldout_loss"], 6),
        "rollbacks": len(found["rollbacks"]),
        **{key: round(value, 6) for key, value in general.items()},
        **({"drift": round(max(found["drift"].values()), 6)} if found["drift"] else {}),
    }


ENDS = {"": "ratio", "_low": "low", "_high": "high"}

STAGE = Stage("sft", Params, run, check_among)
