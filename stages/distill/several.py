"""Several teachers of one tokenizer: one after the other, or mixed.

The student is cut from the first one. Only that teacher's stored prefix is the student's own, and
only its blocks have counterparts in the student, so the others teach by their answers alone, and
the student computes its prefix on their rows.

    mixed      on the same rows: one batch with the weighted mixture of the answers
               (modeling/mixture.py); else each batch is one teacher's, drawn by weight
    sequence   one teacher after the other, each for all steps; with `protect`, from the second on
               some rows of earlier ones are repeated beside each batch, with their own teachers'
               stored answers (experience replay, Robins 1995), `replay_share` of them a row; and
               with a `protect_share` nothing moves in the input subspaces that earlier ones use
               (modeling/protection.py). What either keeps and costs: benchmarks/retention.py

The last rows are held back from all of it, and what is left of each skill is measured on them
(retention.py). With one teacher nothing is held back, mixed or protected: it is plain distillation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.mixture import mix_targets
from modeling.protection import Bases, InputMoments, extend_all, linear_layers, protected_share
from registry.catalog import lookup
from stages.contract import Job
from stages.distill.objective import AnchorMaps, Objective, Weights
from stages.distill.retention import Retention
from stages.distill.training import Lesson, train
from stages.formats.targets import Batch, TeacherTargets
from stages.learning.recovery import Rollback
from stages.ranks import ALONE

if TYPE_CHECKING:
    from stages.distill.params import Params

MIXED, SEQUENCE = "mixed", "sequence"
BARE = Weights(kd=1.0, ce=0.0, anchor=0.0, temperature=1.0)  # to measure by


def replay_pace(params: "Params") -> tuple[int, int]:
    """Rows of earlier teachers to repeat, every so many steps: (rows, steps); (0, 1) for none.

    The nearest to `replay_share`: whole rows beside each batch, or one row every few steps.
    """
    wanted = params.replay_share * params.batch_rows  # rows a step
    if not wanted:
        return 0, 1
    return max(1, round(wanted)), max(1, round(1 / wanted))


def bare(batch: Batch) -> Batch:
    """A batch without what belongs to the teacher's own blocks."""
    return replace(batch, prefix=None, anchors={})


@dataclass(frozen=True)
class GuestLesson(Lesson):
    """What is learnt from a teacher that the student was not cut from: its answers alone.

    earlier: lessons of which rows are replayed beside this one's, in turn.
    """

    earlier: tuple[Lesson, ...] = ()

    def batches(self, start: int) -> Iterator[Batch]:
        """As a lesson's, without what belongs to the teacher's own blocks."""
        yield from map(bare, super().batches(start))

    def replays(self, start: int) -> Iterator[Batch | None]:
        """Rows of earlier lessons at the pace of `replay_pace`; each lesson as it was taught.

        Of several processes each repeats the same ones: there may be fewer rows than processes.
        """
        p, count = self.params, len(self.earlier)
        rows, every = replay_pace(p)
        if not count or not rows:
            yield from super().replays(start)
            return
        own, given = replace(p, batch_rows=rows), start // every
        passes = [
            replace(one, params=own, ranks=ALONE).batches((given + count - 1 - place) // count)
            for place, one in enumerate(self.earlier)
        ]
        for step in range(start, p.steps):
            due = (step + 1) % every == 0
            yield next(passes[step // every % count]) if due else None

    def validation(self) -> Iterator[Batch]:
        """Likewise."""
        yield from map(bare, super().validation())


@dataclass(frozen=True)
class MixedLesson(Lesson):
    """What is learnt from all teachers at once; `targets` and the rest are the first one's."""

    guests: tuple[TeacherTargets, ...] = ()
    weights: tuple[float, ...] = ()  # of the first one and the guests
    same_rows: bool = True

    def batches(self, start: int) -> Iterator[Batch]:
        """Mixtures where rows are the same, else one teacher's batch after the other's."""
        if not self.guests:
            yield from super().batches(start)
        elif self.same_rows:
            yield from self._mixtures(start)
        else:
            yield from self._drawn(start)

    def _mixtures(self, start: int) -> Iterator[Batch]:
        yield from self._mix(self.taught(targets, start) for targets in self._all)

    def validation(self) -> Iterator[Batch]:
        """Mixtures where rows are the same, else each teacher's in turn."""
        p = self.params
        own, *others = (targets.first(p.validation_rows, p.batch_rows) for targets in self._all)
        if self.same_rows:
            yield from self._mix([own, *others])
        else:
            yield from own
            for guest in others:
                yield from map(bare, guest)

    @property
    def _all(self) -> tuple[TeacherTargets, ...]:
        return (self.targets, *self.guests)

    def _mix(self, passes: Iterable[Iterator[Batch]]) -> Iterator[Batch]:
        for first, *others in zip(*passes, strict=True):
            answers = [first.targets, *(batch.targets for batch in others)]
            mixed = mix_targets(answers, self.weights) if others else first.targets
            yield replace(first, targets=mixed)

    def _drawn(self, start: int) -> Iterator[Batch]:
        """Batch n is the next one of a teacher that follows from the seed and n alone."""
        p = self.params
        generator = torch.Generator().manual_seed(p.seed)
        odds = torch.tensor(self.weights)
        drawn = torch.multinomial(odds, p.steps, replacement=True, generator=generator).tolist()
        passes = [
            self.taught(targets, drawn[:start].count(place))
            for place, targets in enumerate(self._all)
        ]
        for place in drawn[start:]:
            batch = next(passes[place])
            yield bare(batch) if place else batch


@dataclass(frozen=True)
class Course:
    """All lessons of a student by teacher, the one it was cut from first."""

    lessons: dict[str, Lesson]
    mixed: MixedLesson

    @classmethod
    def of(cls, lesson: Lesson, opened: dict[str, TeacherTargets]) -> "Course":
        """From the first teacher's lesson and all teachers' targets, the first one's first."""
        params, (first, *names) = lesson.params, opened
        lessons = {first: lesson}
        for name in names:
            own = {**vars(lesson), "targets": opened[name]}
            earlier = tuple(lessons.values()) if params.protect else ()
            lessons[name] = GuestLesson(**own, earlier=earlier)
        guests = tuple(opened[name] for name in names)
        mixed = MixedLesson(
            **vars(lesson),
            guests=guests,
            weights=params.teacher_weights or (1.0,) * len(lessons),
            same_rows=all(same_rows(lesson.targets, other) for other in guests),
        )
        return cls(lessons, mixed)

    @property
    def control(self) -> Lesson:
        """For controls: the rows of all teachers, as many as the student gets."""
        p = self.mixed.params
        later = len(self.lessons) - 1 if p.schedule == SEQUENCE else 0
        rows, every = replay_pace(p)
        repeated = p.steps // every * rows / p.batch_rows if p.protect else 0  # batches
        steps = p.steps + round(later * (p.steps + repeated))
        return replace(self.mixed, params=replace(p, steps=steps))


def teach(
    student: PreTrainedModel, course: Course, weights: Weights, job: Job
) -> tuple[Retention | None, dict[str, list[Rollback]]]:
    """Train the student by the schedule, in place.

    Gives what is left of each skill, and by phase how often training was taken back. None for the
    former with one teacher, which is trained as `train` alone would, to the bit.
    """
    (first, *names), params = course.lessons, course.mixed.params
    rollbacks: dict[str, list[Rollback]] = {}
    if not names:
        rollbacks["student"] = train(student, course.lessons[first], weights, job, "student")
        return None, rollbacks
    columns = {"none": held_out(student, course)}
    if params.schedule == MIXED:
        if course.mixed.same_rows:
            share = course.mixed.weights[0] / sum(course.mixed.weights)
            weights = replace(weights, anchor=weights.anchor * share)
        rollbacks["student"] = train(student, course.mixed, weights, job, "student")
        columns["all"] = held_out(student, course)
    else:
        bases: Bases = {}
        for name, lesson in course.lessons.items():
            own = weights if name == first else replace(weights, anchor=0.0)
            phase = f"student-{name}"
            rollbacks[phase] = train(student, lesson, own, job, phase, bases)
            columns[name] = held_out(student, course)
            if params.protect and params.protect_share:
                bases = protect(student, lesson, name, bases)
                job.say(f"protected after {name}: {protected_share(bases):.1%} of the inputs")
    losses = tuple(zip(*columns.values(), strict=True))
    return Retention(tuple(course.lessons), tuple(columns), losses), rollbacks


def check_vocabulary(head_rows: int, opened: dict[str, TeacherTargets]) -> None:
    """Refuse a teacher that answers with tokens that the student's head does not have.

    One tokenizer may come with larger heads, of tokens that were added to it. What counts is the
    ids that are stored: a head that is larger only by padding is no hindrance. Raises ValueError.
    """
    for name, targets in opened.items():
        if (largest := targets.largest_id()) >= head_rows:
            raise ValueError(
                f"the targets of {name} hold token id {largest}, but the student's head has ids "
                f"0 to {head_rows - 1} only; set distill.teacher_order to start with a teacher "
                f"that has these tokens, as {name}, or leave {name} out of the teachers"
            )


@torch.no_grad()
def protect(student: PreTrainedModel, lesson: Lesson, name: str, bases: Bases) -> Bases:
    """Bases extended by the inputs that the student has on a teacher's rows.

    New directions at most: the largest rank of the tier that the teacher belongs to.
    """
    layers = {
        layer: module
        for layer, module in linear_layers(dissect(student).blocks, "blocks").items()
        if int(layer.split(".")[1]) >= lesson.prefix
    }
    moments, params = InputMoments(layers), lesson.params
    objective = bare_objective(student, lesson)
    rows = min(params.protect_rows, lesson.targets.header.rows - lesson.held_back)
    with moments.watching():
        for picks in torch.arange(rows).split(params.batch_rows):
            objective(replace(lesson.targets.rows(picks), prefix=None))
    most = lookup("tiers", lookup("teachers", name).tier).max_rank
    return extend_all(bases, moments, params.protect_share, most)


@torch.no_grad()
def held_out(student: PreTrainedModel, course: Course) -> list[float]:
    """KL of the student from each teacher on the rows held back, nats a token at temperature 1."""
    losses = []
    for lesson in course.lessons.values():
        objective, header = bare_objective(student, lesson), lesson.targets.header
        parts = []
        for picks in torch.arange(header.rows - lesson.held_back, header.rows).split(
            lesson.params.batch_rows
        ):
            batch = replace(lesson.targets.rows(picks), prefix=None)
            parts += [objective(batch).kl] * len(picks)
        losses.append(sum(parts) / len(parts))
    return losses


def bare_objective(student: PreTrainedModel, lesson: Lesson) -> Objective:
    """The loss by answers alone."""
    return Objective(student, lesson.prefix, [], AnchorMaps([], 1), lesson.subspaces, BARE)


def same_rows(one: TeacherTargets, other: TeacherTargets) -> bool:
    """Whether two teachers answered the same tokens in the same order."""
    if one.header.rows != other.header.rows:
        return False
    return all(
        torch.equal(one.rows(picks).tokens, other.rows(picks).tokens)
        for picks in torch.arange(one.header.rows).split(64)
    )
