"""Group relative policy optimisation: reinforce what a skill gets right, with live tools.

Steps:
  1. go on from the adapter of toolformer; it is also the reference that the policy stays near to
  2. each step: some answers to each of some problems, drawn from the policy, with tools that run;
     rewards that code checks; advantages within each group; one clipped update (rollouts.py,
     policy.py)
  3. now and then, greedily: a fixed set of problems from templates that nothing learns from
  4. keep the policy, or revert to the adapter of step 1 and say so: when fewer probes are right
     than the interval of before allows for, or general text was forgotten

reads    prepare      problems with answers; held-out rows of general text
         profile      subspaces, to measure drift in
         distill      the student
         toolformer   the adapter to go on from
writes   CAPABILITY/    a PEFT adapter of the student
         grpo.json      probes, and why the policy was kept or not
"""

import json

from stages.contract import Job, Metrics, Stage
from stages.grpo.params import Params, check_among


def run(params: Params, job: Job) -> Metrics:
    """Reinforce, measure, decide; see the module's steps."""
    from modeling.lora import keep_reference, merged
    from modeling.skills import open_skill
    from runtime.generation.engine import Engine
    from runtime.tools.dispatch import Tools
    from stages.grpo.policy import Policy
    from stages.grpo.reinforcement import Reinforcement
    from stages.learning.student import find_adapter, open_student
    from stages.measuring.problems import open_problems
    from stages.measuring.verdict import weigh, write_kept

    student = open_student(job.input("distill"), job.inputs("profile"), job.input("prepare"))
    problems = open_problems(job.input("prepare"), params.conversations, params.probe_problems)
    start = find_adapter(job.input("toolformer"), params.capability)
    adapted = open_skill(student.model, start, trains=True, experts_train=False)
    keep_reference(adapted, start)
    policy = Policy.of(
        adapted, student.tokenizer.eos_token_id, params.most_tokens, params.temperature
    )
    state = job.resume(Reinforcement(policy, params))
    coach = make_coach(params, student)
    with Tools(log=job.folder / "calls.jsonl") as tools:
        level = tools.level
        job.say(f"tools: {level}")
        with merged(adapted) as model:
            engine = Engine(model, student.tokenizer, tools)
        job.say(f"answers: {engine.path}")
        reinforce(state, coach, engine, problems, params, job)
    rows = student.heldout(params.general_text, params.heldout_rows)
    verdict = weigh(student, adapted, state.probes, params.general_text, rows, params.forgetting)
    stays = f"the adapter of toolformer stays: {verdict.reason}"
    job.say(stays if verdict.reason else "the policy is kept")
    write_kept(verdict, student, adapted, start, job.output / params.capability)
    facts = {"tools": level, **verdict.facts}
    (job.output / "grpo.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    job.show("grpo.json")
    return verdict.metrics


def make_coach(params: Params, student):
    """What answers are drawn by and rewarded with."""
    from modeling.loading import locate, open_model, open_tokenizer
    from runtime.generation.answers import Sampling
    from stages.grpo.judge import FrozenJudge
    from stages.grpo.rewards import make_rewards
    from stages.grpo.rollouts import Coach, token_counter

    weights = {name: weight for name, weight in vars(params.rewards).items() if weight}
    judge = None
    if params.rewards.judge:
        place = locate(params.judge)
        judge = FrozenJudge(open_model(place), open_tokenizer(place))
    count = token_counter(student.tokenizer)
    rewards = make_rewards(weights, count, params.max_own_tokens, judge)
    sampling = Sampling(
        params.temperature, params.top_p, params.max_own_tokens, params.max_calls, params.seed
    )
    return Coach(student.tokenizer, sampling, params.candidates, rewards, weights, params.loss)


def reinforce(state, coach, engine, problems, params: Params, job: Job) -> None:
    """All steps that are left."""
    from modeling.fast_path import fast_path
    from modeling.lora import merged
    from stages.measuring.probing import ask

    adapted = state.policy.adapted

    def probe() -> None:
        most = params.max_own_tokens, params.max_calls
        state.probes.append(ask(engine, adapted, problems.probes, state.step, *most))
        job.say(f"step {state.step}: {state.probes[-1].share} of the probes are right")

    say = job.say
    if not state.probes:
        probe()
    while state.step < params.steps:
        with merged(adapted):
            engine.refresh()
            chosen = problems.draw(state.step, params.prompts, params.seed)
            traces, seen = coach.roll_out(engine, chosen, state.step)
        with fast_path(state.policy.model, say):
            seen |= state.learn(traces)
        say = _say_no_more
        if state.step % params.probe_every == 0 or state.step == params.steps:
            probe()
            seen |= {"probe_right": state.probes[-1].share.value}
        job.step_done(state, state.step, params.steps, **seen)


def _say_no_more(_text: str) -> None:
    """What keeps its own code has been said in the first step."""


STAGE = Stage("grpo", Params, run, check_among)
