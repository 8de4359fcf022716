"""Toolformer: the model finds out itself where a call helps, and learns from these (Schick 2023).

Steps:
  1. go on from the adapter of sft, which knows the form of a call
  2. texts without calls: where, shortly before a number that nothing gives away, would the model
     begin one, and which (proposals.py)? Run them
  3. keep a call only where its result makes what follows likelier, by at least a threshold
     (usefulness.py)
  4. train on the kept calls in their places, beside as many of sft's conversations; what stands
     around the calls is read, and left out of the loss, as what tools gave is
  5. keep what was learnt, or revert to the adapter of step 1 and say so: when no call was kept,
     fewer probes are right than the interval of before allows for, or general text was forgotten

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

MOST_OWN, MOST_CALLS = 128, 8  # of an answer to a probe
CALL_TOKENS = 48  # of a call that is proposed


def run(params: Params, job: Job) -> Metrics:
    """Propose, filter, train, decide; see the module's steps."""
    from modeling.lora import merged
    from modeling.skills import open_skill
    from runtime.generation.engine import Engine
    from runtime.tools.dispatch import Tools
    from stages.learning.finetuning import finetune
    from stages.learning.student import find_adapter, open_student
    from stages.measuring.probing import ask
    from stages.measuring.problems import open_problems
    from stages.measuring.verdict import weigh, write_kept
    from stages.toolformer.report import write_samples

    student = open_student(job.input("distill"), job.inputs("profile"), job.input("prepare"))
    start = find_adapter(job.input("sft"), params.capability)
    adapted = open_skill(student.model, start, trains=True)
    problems = open_problems(job.input("prepare"), params.conversations, params.probe_problems)
    with Tools(params.tools, log=job.folder / "calls.jsonl") as tools:
        job.say(f"tools: {tools.level}")
        with merged(adapted) as model:
            engine = Engine(model, student.tokenizer, tools)
            found = find_calls(model, engine, student.tokenizer, params, job)
        level = tools.level
        before = after = ask(engine, adapted, problems.probes, 0, MOST_OWN, MOST_CALLS)
        rollbacks = []
        if found.told:
            lesson = make_lesson(found.told, params, job, student.tokenizer)
            rollbacks = finetune(adapted, lesson, job, params.capability)
            after = ask(engine, adapted, problems.probes, params.steps, MOST_OWN, MOST_CALLS)
    rows = student.heldout(params.general_text, params.heldout_rows)
    useless = f"no call made what follows likelier by {params.threshold:g} nats"
    verdict = weigh(
        student, adapted, (before, after), params.general_text, rows, params.forgetting,
        None if found.told else useless,
    )  # fmt: skip
    job.say(f"the adapter of sft stays: {verdict.reason}" if verdict.reason else "learnt and kept")
    write_kept(verdict, student, adapted, start, job.output / params.capability)
    write_samples(found, job.output / "samples.md")
    facts = {"tools": level, **found.counts, **verdict.facts}
    facts["rollbacks"] = [asdict(back) for back in rollbacks]
    (job.output / "toolformer.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    job.show("samples.md")
    job.show("toolformer.json")
    return {**found.counts, **verdict.metrics}


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
            model, text, number, params.tools, tokenizer, params.places, params.place_probability,
            params.following_tokens,
        )  # fmt: skip
        job.note("places", number + 1, len(texts), places=len(places))
    sampling = Sampling(1.0, 1.0, CALL_TOKENS, 0, params.seed)
    proposals, written = propose(engine, texts, places, tokenizer, sampling, params.tries)
    judged = judge(
        model, texts, proposals, tokenizer, write_result, params.following_tokens,
        params.most_tokens,
    )  # fmt: skip
    kept = keep_best(judged, params.threshold)
    job.say(
        f"of {written} calls written at {len(places)} places of {len(texts)} texts, "
        f"{len(proposals)} different ones gave a result and {len(kept)} were kept"
    )
    return Found(texts, written, judged, kept, with_calls(texts, kept, write_result))


def make_lesson(told: list, params: Params, job: Job, tokenizer):
    """The texts with their calls, and as many of sft's conversations."""
    import torch

    from stages.formats.conversations import read_conversations
    from stages.formats.tokens import read_all_rows
    from stages.learning.finetuning import Lesson
    from stages.learning.supervision import encode

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
