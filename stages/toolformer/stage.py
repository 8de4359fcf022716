"""Toolformer: the model finds out itself where a call helps, and learns from these (Schick 2023).

Steps:
  1. go on from the adapter of sft, which knows the form of a call
  2. texts without calls: where would the model begin one, and which (proposals.py)? Run them
  3. keep a call only where its result makes what follows likelier, by at least a threshold
     (usefulness.py)
  4. train on the texts with the kept calls in their places, beside as many of sft's conversations;
     masked are what tools gave and numbers that could only be recited (stages/number_masking.py)
  5. keep what was learnt, or revert to the adapter of step 1 and say so: when fewer probes are
     right than the interval of before allows for, or general text was forgotten

Steps 2 and 3 are done again after an interruption; step 4 goes on from its checkpoint.

reads    prepare      texts, conversations, problems; rows of general text
         profile      subspaces, to measure drift in
         distill      the student
         sft          the adapter to go on from
writes   CAPABILITY/       a PEFT adapter of the student
         toolformer.json   what was proposed and kept, and why the adapter was or was not
         samples.md        calls that were kept and refused, to check by hand
"""

import json
from dataclasses import asdict

from stages.contract import Job, Metrics, Stage
from stages.toolformer.params import Params, check_among

BATCH_ROWS = 4  # of general text, where it is only measured
MOST_OWN, MOST_CALLS = 128, 8  # of an answer to a probe
CALL_TOKENS = 48  # of a call that is proposed


def run(params: Params, job: Job) -> Metrics:
    """Propose, filter, train, decide; see the module's steps."""
    from modeling.lora import merged
    from modeling.skills import open_skill, save_skill
    from runtime.generation.engine import Engine
    from runtime.tools.dispatch import Tools
    from stages.finetuning import finetune
    from stages.forgetting import compare, row_losses
    from stages.probing import ask, why_not
    from stages.problems import open_problems
    from stages.student import find_adapter, open_student
    from stages.toolformer.report import write_samples

    student = open_student(job.input("distill"), job.inputs("profile"), job.input("prepare"))
    start = find_adapter(job.input("sft"), params.capability)
    adapted = open_skill(student.model, start, trains=True)
    problems = open_problems(job.input("prepare"), params.conversations, params.probe_problems)
    general = student.heldout(params.general_text, params.heldout_rows)
    rows_before = row_losses(student.untouched, general, BATCH_ROWS)
    with Tools(params.tools, log=job.folder / "calls.jsonl") as tools:
        job.say(f"tools: {tools.level}")
        with merged(adapted) as model:
            engine = Engine(model, student.tokenizer, tools)
            found = find_calls(model, engine, student.tokenizer, params, job)
        before = ask(engine, adapted, problems.probes, 0, MOST_OWN, MOST_CALLS)
        lesson = make_lesson(found.told, params, job, student.tokenizer)
        rollbacks = finetune(adapted, lesson, job, params.capability)
        after = ask(engine, adapted, problems.probes, params.steps, MOST_OWN, MOST_CALLS)
    with merged(adapted) as model:
        forgetting = compare(rows_before, row_losses(model, general, BATCH_ROWS))
        drift = student.drift(model, general[:BATCH_ROWS])
    reason = why_not(before, after, forgetting, params.forgetting, params.general_text)
    job.say(f"the adapter of sft stays: {reason}" if reason else "what was learnt is kept")
    kept = open_skill(student.untouched, start) if reason else adapted
    save_skill(kept, job.output / params.capability, job.folder / "start")
    write_samples(found, job.output / "samples.md")
    job.show("samples.md")
    facts = {
        "reverted": reason,
        **found.counts,
        "probes": [{**vars(probe), "share": str(probe.share)} for probe in (before, after)],
        "general": asdict(forgetting),
        "drift": drift,
        "rollbacks": [asdict(back) for back in rollbacks],
    }
    (job.output / "toolformer.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {
        **found.counts,
        "adapter_kept": float(reason is None),
        "probe_right_before": round(before.share.value, 6),
        "probe_right": round(after.share.value, 6),
        "perplexity_ratio": round(forgetting.ratio, 6),
        **({"drift": round(max(drift.values()), 6)} if drift else {}),
    }


def find_calls(model, engine, tokenizer, params: Params, job: Job):
    """Steps 2 and 3."""
    from runtime.generation.answers import Sampling
    from runtime.tools.calls import write_result
    from stages.formats.conversations import read_conversations
    from stages.toolformer.proposals import Text, find_places, propose
    from stages.toolformer.report import Found
    from stages.toolformer.usefulness import judge, keep_best, with_calls

    prepared = job.input("prepare")
    told = [c for name in params.texts for c in read_conversations(prepared, name, "train")]
    texts = [Text.of(conversation, tokenizer) for conversation in told[: params.most_texts]]
    places = []
    for number, text in enumerate(texts):
        places += find_places(
            model, text, number, params.tools, tokenizer, params.places, params.place_probability
        )
        job.note("places", number + 1, len(texts), places=len(places))
    sampling = Sampling(1.0, 1.0, CALL_TOKENS, 0, params.seed)
    proposals, written = propose(engine, texts, places, tokenizer, sampling, params.tries)
    judged = judge(
        model, texts, proposals, tokenizer, write_result, params.following_tokens,
        params.most_tokens,
    )  # fmt: skip
    kept = keep_best(judged, params.threshold)
    found = Found(texts, written, judged, kept, with_calls(texts, kept, write_result))
    job.say(
        f"of {written} calls written at {len(places)} places of {len(texts)} texts, "
        f"{len(proposals)} different ones gave a result and {len(kept)} were kept"
    )
    if not kept:
        raise ValueError(
            "no call made what follows likelier by the threshold; lower 'threshold' or "
            "'place_probability', raise 'tries' or 'most_texts', or train sft for longer"
        )
    return found


def make_lesson(told: list, params: Params, job: Job, tokenizer):
    """The texts with their calls, and as many of sft's conversations."""
    import torch

    from stages.finetuning import Lesson
    from stages.formats.conversations import read_conversations
    from stages.formats.tokens import read_all_rows
    from stages.supervision import encode

    prepared = job.input("prepare")
    known = [
        c for name in params.conversations for c in read_conversations(prepared, name, "train")
    ]
    kept_out = params.validation_conversations
    found, taught = (
        [one for one in (encode(c, tokenizer) for c in part) if len(one) <= params.most_tokens]
        for part in (told, known[kept_out : kept_out + len(told)])
    )
    if len(found) < len(told):
        job.say(f"{len(told) - len(found)} texts with calls are longer than most_tokens: left out")
    if not found:
        raise ValueError(
            f"none of {len(told)} texts with calls fits into {params.most_tokens} tokens; raise "
            "'most_tokens'"
        )
    validation = [encode(c, tokenizer) for c in known[:kept_out]]
    general = torch.from_numpy(read_all_rows(prepared, "train", params.seed))
    return Lesson(params, found + taught, validation, general, tokenizer.eos_token_id)


STAGE = Stage("toolformer", Params, run, check_among)
