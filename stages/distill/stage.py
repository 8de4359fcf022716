"""Distil: make a smaller student and teach it the teacher's next-token distribution.

Steps:
  1. build the student (construction.py): the teacher less the blocks of least ablation harm, its
     blocks narrower or not, refitted in closed form on calibration rows; or a new network
  2. train what is not shared with the teacher on the stored targets (objective.py); of several
     teachers in sequence, protected or not, or mixed, with the retention matrix (several.py)
  3. controls: the student before step 2, and some trained at the same budget without a part of
     the loss (CONTROLS)

reads    prepare   calibration rows
         profile   ablation harm, subspaces
         extract   teacher targets
writes   student/, before_training/ and one of each control: stock transformers folders
         student.json
         retention.png, retention.txt: with several teachers
"""

import copy
import json
from dataclasses import asdict, replace

from stages.contract import Job, Metrics, Stage
from stages.distill.params import CONTROLS, Params, check_among, check_temperature


def run(params: Params, job: Job) -> Metrics:
    """Build, train, and train the controls; see the module's steps."""
    import torch

    from modeling.blocks import dissect
    from modeling.loading import locate, open_model, open_tokenizer
    from stages.distill.construction import Source, construct
    from stages.distill.objective import Weights
    from stages.distill.several import Course, check_vocabulary, teach
    from stages.distill.training import Lesson, train
    from stages.formats.importance import read_importance, read_subspaces
    from stages.formats.tokens import read_all_rows

    device = take_device(params)
    opened = open_targets(params, job)
    teacher_name, targets = next(iter(opened.items()))
    profile, location = job.inputs("profile")[teacher_name], locate(teacher_name)
    harms, subspaces = [b.harm for b in read_importance(profile)], read_subspaces(profile)
    teacher, tokenizer = open_model(location, device), open_tokenizer(location)
    check_vocabulary(len(dissect(teacher).head.weight), opened)
    rows = torch.from_numpy(read_all_rows(job.input("prepare"), "calibration", params.seed))
    source = Source(teacher, harms, targets.header.prefix_blocks, rows.to(device), params, job)
    built = construct(source)
    student = built.student
    save_student(student, tokenizer, job, "before_training")

    kept_out = params.retention_rows if len(opened) > 1 else 0
    lesson = Lesson(
        targets, subspaces, built.prefix, built.dropped, harms, params, kept_out, built.lift,
        job.ranks,
    )  # fmt: skip
    course = Course.of(lesson, opened)
    full = Weights(**params.losses)
    untrained = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    retention, rollbacks = teach(student, course, full, job)
    save_student(student, tokenizer, job, "student")
    for name in params.controls:
        student.load_state_dict(untrained)
        weights = replace(full, **CONTROLS[name])
        rollbacks[name] = train(student, course.control, weights, job, name)
        save_student(student, tokenizer, job, name)

    facts = {"teacher": teacher_name, **built.facts}
    facts["rollbacks"] = {phase: [asdict(back) for back in of] for phase, of in rollbacks.items()}
    if retention:
        facts["teachers"] = list(opened)
        show_retention(retention, job)
    if job.leads:
        (job.output / "student.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {
        "blocks": len(dissect(student).blocks),
        "rollbacks": sum(map(len, rollbacks.values())),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_of_teacher": sum(p.numel() for p in teacher.parameters()),
        "tokens_trained": course.control.params.steps
        * params.batch_rows
        * targets.header.row_tokens,
        **built.metrics,
        **(retention.metrics() if retention else {}),
    }


def check_first(teacher: str, prepared) -> None:
    """Refuse to cut a student, who reads the rows, from a teacher with another tokenizer."""
    from modeling.loading import locate, open_tokenizer
    from stages.formats.tokens import maker_of, same_tokenizer

    if not same_tokenizer(prepared, open_tokenizer(locate(teacher))):
        raise ValueError(
            f"the student is cut from the first teacher, '{teacher}', which has another tokenizer "
            f"than '{maker_of(prepared)}', which made the rows; name a teacher of that tokenizer "
            f"first in distill.teacher_order, or set prepare.tokenizer to {teacher}"
        )


def take_device(params: Params):
    """The device that all is computed on; refuses an optimizer that cannot run here, at once."""
    from modeling.backends import be_deterministic, default_device
    from stages.learning.optimizers import check_optimizer

    check_optimizer(params.optimizer)
    device = default_device()
    be_deterministic(device)
    return device


def open_targets(params: Params, job: Job) -> dict:
    """The targets of each teacher, in the order in which they teach; refuses those that cannot."""
    from stages.formats.targets import TeacherTargets

    folders = job.inputs("extract")
    order = order_teachers(params, list(folders))
    opened = {name: TeacherTargets(folders[name]) for name in order}
    for targets in opened.values():
        check_temperature(params, targets.header.samples)
    check_first(order[0], job.input("prepare"))
    return opened


def order_teachers(params: Params, names: list[str]) -> list[str]:
    """The teachers in the order in which they teach, the one that the student is cut from first.

    Raises ValueError, naming what is there, for an order or weights that are not one a teacher.
    """
    order = list(params.teacher_order) or names
    if sorted(order) != sorted(names):
        raise ValueError(
            f"'teacher_order' is {', '.join(order)}, but there are targets of {', '.join(names)}; "
            "set distill.teacher_order to these, in the order you want, or to []"
        )
    if len(params.teacher_weights) not in (0, len(names)):
        raise ValueError(
            f"'teacher_weights' has {len(params.teacher_weights)} weights for {len(names)} "
            f"teachers ({', '.join(order)}); give one each, in this order, or []"
        )
    return order


def show_retention(retention, job: Job) -> None:
    """Write the retention matrix as a picture and as text, and print it."""
    from stages.distill.retention import draw_retention

    if not job.leads:
        return
    draw_retention(retention, "what is left of each skill", job.output / "retention.png")
    (job.output / "retention.txt").write_text(retention.table() + "\n", encoding="utf-8")
    job.show("retention.png")
    for line in retention.table().splitlines():
        job.say(line)


def save_student(student, tokenizer, job: Job, name: str) -> None:
    """Write a folder that stock transformers opens: safetensors in bfloat16, config, tokenizer."""
    import torch

    if job.leads:
        copy.deepcopy(student).to(torch.bfloat16).save_pretrained(job.output / name)
        tokenizer.save_pretrained(job.output / name)


STAGE = Stage("distill", Params, run, check_among)
