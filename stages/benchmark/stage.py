"""Benchmark: the student measured against its teacher and its controls.

Steps:
  1. score teacher, student and controls on held-out text and on text of other kinds: perplexity,
     KL over the full vocabulary, top-1 agreement, each with a bootstrap interval over rows
  2. drift: how far the states of each are from the teacher's, block by block
  3. problems with tools, after each stage that taught the student a skill (skills.py)
  4. replies to held-out queries, with the adapter that the router chooses and with every other
     (routing.py)
  5. size, speed and memory of teacher and student
  6. write a report for people

reads    prepare   held-out and benchmark rows; problems that nothing was decided by
         profile   the picture
         distill   the student and its controls
         route     the router
         sft, toolformer, grpo   adapters of the student
writes   report.html, test_report.md, scores.json
         skills.json         every answer to every problem
         routing.json        what each adapter makes of each query
         capabilities.json   what each capability is, costs and is worth
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.catalog import lookup
from stages.agreement import require_capability, require_prepared
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least

STUDENT = "student"
AT_ONCE = 32  # problems


@dataclass(frozen=True)
class Params:
    """The section `benchmark` of params.yaml; comments and units stand there."""

    batch_rows: int
    resamples: int
    speed_rounds: int
    drift_rows: int
    capability: str
    conversations: tuple[str, ...]
    problems: int
    max_own_tokens: int
    max_calls: int
    routed_queries: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(1, batch_rows=self.batch_rows, speed_rounds=self.speed_rounds)
        require_at_least(1, drift_rows=self.drift_rows, problems=self.problems)
        require_at_least(1, max_own_tokens=self.max_own_tokens, max_calls=self.max_calls)
        require_at_least(1, routed_queries=self.routed_queries)
        require_at_least(100, resamples=self.resamples)
        require_at_least(0, seed=self.seed)


def check_among(sections: Mapping[str, Any]) -> None:
    """Refuse what other stages' parameters contradict, before anything runs."""
    require_prepared("benchmark", sections["benchmark"].conversations, sections)
    require_capability("benchmark", sections)
    for capability in sections["sft"].capabilities if "sft" in sections else ():
        lookup("capabilities", capability.name)  # manifest and router know no others


def run(params: Params, job: Job) -> Metrics:
    """Score, compare states, time, report; see the module's steps."""
    from modeling.loading import locate, open_model
    from stages.benchmark.findings import Findings
    from stages.benchmark.report import write_reports
    from stages.benchmark.routing import flatten_routing
    from stages.benchmark.scoring import TEACHER, compare
    from stages.benchmark.skills import assess, flatten_skills
    from stages.benchmark.speed import peak_memory_gib, time_models

    distilled = job.input("distill")
    facts = json.loads((distilled / "student.json").read_text(encoding="utf-8"))
    location = locate(facts["teacher"])
    folders = {path.parent.name: path.parent for path in sorted(distilled.glob("*/config.json"))}
    models = {TEACHER: open_model(location)}
    models |= {name: open_model(folder) for name, folder in folders.items()}
    texts = read_texts(job.input("prepare"))
    scores = score_all(models, texts, params, job)

    table = {
        name: {text: compare(scores, name, text, params.resamples, params.seed) for text in texts}
        for name in models
    }
    profile = job.inputs("profile")[facts["teacher"]]
    sample = next(iter(texts.values()))[: params.drift_rows]
    drift = measure_drift(models, facts["dropped"], profile, sample, params)
    skills = assess(solve_all(folders[STUDENT], params, job))
    routing = route_all(facts["teacher"], params, job)
    pair = {name: models[name] for name in (TEACHER, STUDENT)}
    speed = time_models(pair, next(iter(texts.values()))[: params.batch_rows], params.speed_rounds)
    for name, place in ((TEACHER, Path(location.path)), (STUDENT, folders[STUDENT])):
        speed[name]["parameters"] = sum(p.numel() for p in models[name].parameters())
        if place.is_dir():
            speed[name]["weights_mib"] = weights_bytes(place) / 2**20
            speed[name]["peak_memory_gib"] = peak_memory_gib(place)
    findings = Findings(facts, table, speed, profile / "profile.png", drift, skills, routing)
    write_reports(findings, job.output)
    job.show("report.html")
    job.show("test_report.md")
    job.measured(**{f"{name}_{k}": v for name, values in speed.items() for k, v in values.items()})
    scored = {
        n: {t: {m: asdict(e) for m, e in c.items()} for t, c in r.items()} for n, r in table.items()
    }
    (job.output / "scores.json").write_text(json.dumps(scored, indent=1), encoding="utf-8")
    means = {f"{name}.drift": sum(of.values()) / len(of) for name, of in drift.items()}
    return {**flatten(table), **means, **flatten_skills(skills), **flatten_routing(routing)}


def read_texts(prepared: Path) -> dict:
    """Token rows by name: held-out ones first (what the student was trained for), then others."""
    import torch

    from stages.formats.tokens import read_rows

    texts = {}
    for split in ("heldout", "benchmark"):
        for source, rows in read_rows(prepared, split).items():
            texts[f"{source}-{split}" if source in texts else source] = torch.from_numpy(rows)
    return dict(sorted(texts.items(), key=lambda item: item[0] != "python-docs"))


def score_all(models: dict, texts: dict, params: Params, job: Job):
    """Score every model on every text; goes on from a checkpoint."""
    from stages.benchmark.scoring import Scores, score_batch

    work = [(text, part) for text, rows in texts.items() for part in rows.split(params.batch_rows)]
    scores = job.resume(Scores())
    for text, tokens in work[scores.batches :]:
        for name, measures in score_batch(models, tokens).items():
            for measure, values in measures.items():
                scores.add(f"{name}/{text}/{measure}", values)
        scores.batches += 1
        kl = scores.rows[f"{STUDENT}/{text}/kl"].mean().item()
        job.step_done(scores, scores.batches, len(work), student_kl=kl)
    return scores


def solve_all(folder: Path, params: Params, job: Job):
    """Let the student solve problems with each stage's adapter; goes on from a checkpoint."""
    from modeling.loading import open_model, open_tokenizer
    from modeling.skills import open_skilled
    from runtime.generation.answers import Sampling
    from runtime.generation.engine import Engine
    from runtime.tools.dispatch import Tools
    from stages.benchmark.skills import STEPS, SkillScores
    from stages.measuring.problems import benchmark_problems
    from stages.measuring.solving import solve

    adapters = {
        "sft": job.input("sft") / params.capability,
        "toolformer": job.input("toolformer") / params.capability,
        "grpo": job.input("grpo") / params.capability,
    }
    problems = benchmark_problems(job.input("prepare"), params.conversations)[: params.problems]
    student, tokenizer = open_model(folder), open_tokenizer(folder)
    sampling = Sampling(0.0, 1.0, params.max_own_tokens, params.max_calls, 0)
    scores = job.resume(SkillScores(), "skills")
    total = len(problems) * len(STEPS)
    with Tools(log=job.folder / "calls.jsonl") as tools:
        job.say(f"tools: {tools.level}")
        for name in STEPS:
            solved = scores.solved[name]
            if len(solved) == len(problems):
                continue
            model = open_skilled(student, adapters[name]) if name in adapters else student
            engine = Engine(model, tokenizer, tools)
            for part in solve(engine, tokenizer, problems[len(solved) :], sampling, AT_ONCE):
                solved += part
                right = sum(one.right for one in solved) / len(solved)
                job.step_done(scores, scores.done, total, "skills", **{f"{name}_right": right})
    scores.save(job.output)
    return scores


def route_all(teacher: str, params: Params, job: Job):
    """What choosing adapters is worth; None where there is none. Goes on from a checkpoint.

    Adapters are sft's, which learnt such replies. Writes routing.json and capabilities.json.
    """
    from stages.benchmark.capabilities import describe, write_capabilities
    from stages.benchmark.replies import RoutedStudent
    from stages.benchmark.routing import RoutingScores, assess_routing, heldout_queries

    student = RoutedStudent(job.input("distill") / STUDENT, job.input("route"), job.input("sft"))
    for what, reason in student.without.items():
        job.say(f"routing: without {what}: {reason}")
    told = heldout_queries(job.input("prepare"), student.capabilities, params.routed_queries)
    scores = job.resume(RoutingScores(), "routing")
    for capability, conversation in told[len(scores.queries) :] if student.adapters else ():
        scores.queries.append(student.score(capability, conversation))
        job.step_done(scores, len(scores.queries), len(told), "routing")
    scores.save(job.output)
    records = describe(student.capabilities, student.adapters, scores.queries, teacher)
    write_capabilities(records, job.output)
    if not scores.queries:
        return None
    return assess_routing(scores.queries, params.resamples, params.seed, student.without)


def measure_drift(
    models: dict, dropped: list[int], profile: Path, rows, params: Params
) -> dict[str, dict[int, float]]:
    """The drift of each model from the teacher: model -> block of the teacher -> drift.

    Empty for students of another width and for new networks: their states have other axes.
    """
    from modeling.blocks import dissect
    from stages.benchmark.scoring import TEACHER
    from stages.formats.importance import read_subspaces
    from stages.measuring.drift import Site, counterparts, subspace_drift

    teacher, subspaces = models[TEACHER], read_subspaces(profile)
    shapes = {
        name: (len(dissect(model).blocks), model.get_input_embeddings().weight.shape[1])
        for name, model in models.items()
    }
    blocks, width = shapes[TEACHER]
    if shapes[STUDENT] != (blocks - len(dropped), width):
        return {}
    places = counterparts(range(len(subspaces.mean)), dropped)
    sites = [Site(block, block, place) for block, place in places.items()]
    return {
        name: dict(
            zip(
                places,
                subspace_drift(teacher, model, sites, subspaces, rows, params.batch_rows),
                strict=True,
            )
        )
        for name, model in models.items()
        if name != TEACHER
    }


def flatten(table: dict) -> Metrics:
    """One flat name a number: MODEL.TEXT.MEASURE and, for the student, its interval."""
    flat: Metrics = {}
    for name, texts in table.items():
        for text, measures in texts.items():
            for measure, estimate in measures.items():
                flat[f"{name}.{text}.{measure}"] = round(estimate.value, 6)
                if name == STUDENT:
                    flat[f"{name}.{text}.{measure}_low"] = round(estimate.low, 6)
                    flat[f"{name}.{text}.{measure}_high"] = round(estimate.high, 6)
    return flat


def weights_bytes(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


STAGE = Stage("benchmark", Params, run, check_among)
