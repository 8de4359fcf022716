"""Train the adapter router: which skill a query wants, and when none does (Nexus: intent router).

Steps:
  1. collect queries: requests of each capability's data sets, others in all kinds of wordings, and
     some that are out of scope (queries.py)
  2. let the student read them; keep their pooled states behind some blocks
     (modeling/pooled_states.py)
  3. train and calibrate routers that read more and more of these blocks; keep the one that reads as
     few as it needs (fitting.py; modeling/router.py)
  4. measure on held-out, paraphrased and near-miss queries (scoring.py), and what adding each
     capability last changes for the others (growth.py)

Step 2 goes on from its checkpoint; the others take seconds and are done again.

reads    prepare   conversations
         distill   the student
writes   router.safetensors, router.json   the router
         known.safetensors                 what it learnt from, to add a capability with
         route.json, route.png             figures
"""

import json
from dataclasses import asdict

from stages.contract import Job, Metrics, Stage
from stages.route.params import Params, check_among

BATCH = 32  # queries of the same length that are read together
MEASURED = ("heldout", "paraphrased", "near")


def run(params: Params, job: Job) -> Metrics:
    """Collect, read, fit, measure; see the module's steps."""
    from modeling.router import RouterShape, save_router
    from stages.route.fitting import best_depth
    from stages.route.growth import Queries, together
    from stages.route.picture import draw_router
    from stages.route.queries import gather
    from stages.route.scoring import route

    sets = gather(
        job.input("prepare"), params.capabilities, params.queries, params.validation_share,
        params.seed,
    )  # fmt: skip
    states = read_states(sets.all, params, job)
    train, validation, *measured = (
        label(getattr(sets, name), states, params.capabilities)
        for name in ("train", "validation", *MEASURED)
    )
    shape = RouterShape(params.capabilities, params.blocks, train.states.shape[-1], params.hidden)
    course = course_of(params)
    router, losses = best_depth(train, validation, shape, course, params.answered)
    shape = router.shape
    job.say(
        f"it reads the states behind {', '.join(map(str, shape.blocks))} (validation loss "
        f"{losses[shape.blocks[-1]]:.4f})"
    )
    save_router(router, job.output)
    depth = len(shape.blocks)
    train, validation, *measured = (part.first(depth) for part in (train, validation, *measured))
    save_known(train, validation, job.output / "known.safetensors")
    routed = {name: route(router, part) for name, part in zip(MEASURED, measured, strict=True)}
    queries = Queries(train, validation, together(*measured[:2]))
    growth = grow_each(queries, shape, params, course)
    metrics = measure(routed) | {"block": shape.blocks[-1]} | flatten(growth)
    draw_router(routed["heldout"], "Router, held-out queries", job.output / "route.png")
    facts = {
        "metrics": metrics,
        "losses": losses,
        "growth": {name: asdict(one) for name, one in growth.items()},
    }
    (job.output / "route.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    job.show("route.png")
    job.show("route.json")
    return metrics


def course_of(params: Params):
    """How routers are trained."""
    from modeling.router import LossWeights
    from stages.route.fitting import Course

    weights = LossWeights(params.z_loss, params.diversity, params.confidence)
    return Course(
        params.steps, params.batch_queries, params.learning_rate, params.weight_decay, weights,
        params.seed,
    )  # fmt: skip


def read_states(queries: list, params: Params, job: Job) -> dict:
    """The queries' pooled states: query -> (B, D); goes on from a checkpoint."""
    from modeling.backends import default_device
    from modeling.loading import open_model, open_tokenizer
    from stages.route.reading import States, batches, read_batch, require_blocks

    folder = job.input("distill") / "student"
    model, tokenizer = open_model(folder, default_device()), open_tokenizer(folder)
    require_blocks(model, params.blocks)
    states = job.resume(States(len(queries), params.blocks))
    work = list(batches(queries, tokenizer, BATCH))
    for batch in work[states.batches :]:
        states.add(batch.places, read_batch(model, batch, params.blocks))
        job.step_done(states, states.batches, len(work))
    return dict(zip(queries, states.found, strict=True))


def label(queries: list, states: dict, capabilities):
    """States and classes of queries, as `fitting` wants them."""
    import torch

    from stages.route.fitting import Labelled

    places = {name: index for index, name in enumerate(capabilities)}
    classes = [places.get(query.capability, len(places)) for query in queries]
    return Labelled(torch.stack([states[query] for query in queries]), torch.tensor(classes))


def save_known(train, validation, path) -> None:
    """Write the states that were learnt from and calibrated with."""
    from safetensors.torch import save_file

    parts = {"train": train, "validation": validation}
    states = {f"{name}.states": part.states.half().contiguous() for name, part in parts.items()}
    save_file(states | {f"{name}.classes": p.classes for name, p in parts.items()}, path)


def measure(routed: dict) -> Metrics:
    """Flat figures of the sets that were routed."""
    from stages.route.scoring import auroc, calibration_error, load, macro_f1, right

    heldout, paraphrased, near = (routed[n] for n in ("heldout", "paraphrased", "near"))
    inside = heldout.confidence[heldout.inside]
    found = {
        "heldout.right": right(heldout).value,
        "heldout.macro_f1": macro_f1(heldout),
        "heldout.calibration_error": calibration_error(heldout),
        "heldout.auroc": auroc(inside, heldout.confidence[~heldout.inside]),
        "near.auroc": auroc(inside, near.confidence),
        "near.abstained": right(near).value,
        "paraphrased.right": right(paraphrased).value,
        "paraphrased.macro_f1": macro_f1(paraphrased),
        **{f"load.{name}": share for name, share in load(heldout).items()},
    }
    return {name: round(value, 6) for name, value in found.items()}


def grow_each(queries, shape, params: Params, course) -> dict:
    """For each capability, what adding it last makes of the router."""
    from stages.route.growth import leave_out_and_add

    return {
        name: leave_out_and_add(name, queries, shape, course, params.answered)
        for name in params.capabilities
    }


def flatten(growth: dict) -> Metrics:
    """Flat figures of what adding each capability makes of the router."""
    found: Metrics = {}
    for how in ("", "anew_"):
        moved = [c for one in growth.values() for c in getattr(one, f"{how}changes").values()]
        own = [getattr(one, f"{how}right") for one in growth.values()]
        found |= {
            f"growth.{how}worst_change": round(min(moved), 4),
            f"growth.{how}mean_change": round(sum(moved) / len(moved), 4),
            f"growth.{how}right": round(sum(own) / len(own), 6),
        }
    return found


STAGE = Stage("route", Params, run, check_among)
