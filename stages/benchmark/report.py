"""Reports for people: report.html, one self-contained page, and test_report.md, its plain text."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.benchmark.scoring import TEACHER, Estimate
from stages.benchmark.skills import Skill, skill_verdicts

STUDENT = "student"
LABELS = {
    TEACHER: "teacher",
    STUDENT: "student",
    "before_training": "student before training",
    "text_only": "control: trained on the text alone",
    "without_anchors": "control: trained without anchors",
    "without_text": "control: trained without the text",
    "without_answers": "control: trained without the teacher's answers",
}
COLOURS = {
    STUDENT: "#4477aa", "before_training": "#bbbbbb", "text_only": "#ee7733",
    "without_anchors": "#228833", "without_text": "#aa3377", "without_answers": "#ccbb44",
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """Everything that a report says.

    facts: student.json.  table: model -> text -> measure -> Estimate.  speed: model -> numbers.
    drift: model -> teacher block -> its drift (stages/measuring/drift.py); empty where the student
    has none of the teacher's blocks.  skills: problems solved with tools, by the stage that taught
    it.
    """

    facts: dict[str, Any]
    table: dict[str, dict[str, dict[str, Estimate]]]
    speed: dict[str, dict[str, float]]
    profile_picture: Path
    drift: dict[str, dict[int, float]] = field(default_factory=dict)
    skills: dict[str, Skill] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """Names of the texts measured on; the first is what the student was trained for."""
        return list(self.table[TEACHER])

    @property
    def controls(self) -> list[str]:
        """Models that are neither teacher nor student, in the order of LABELS."""
        order = list(LABELS)
        others = [name for name in self.table if name not in (TEACHER, STUDENT)]
        return sorted(others, key=lambda n: order.index(n) if n in order else len(order))


def write_reports(findings: Findings, folder: Path) -> None:
    """Write both files."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=select_autoescape(["html"]))
    page = templates.get_template("report.html").render(
        f=findings,
        labels=LABELS,
        verdicts=verdicts(findings),
        chart=_embedded(_draw_chart(findings)),
        profile=_embedded(findings.profile_picture.read_bytes()),
        drift=_embedded(draw_drift(findings.drift)) if findings.drift else None,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "test_report.md").write_text(markdown(findings), encoding="utf-8")


def verdicts(findings: Findings) -> list[str]:
    """What the numbers say, in sentences; a control that is not beaten is named."""
    sentences = []
    for text in findings.texts:
        student = findings.table[STUDENT][text]
        ratio, agreement = student["perplexity_ratio"], student["agreement"]
        sentences.append(
            f"On {text} the student's perplexity is {ratio.value:.3f} times the teacher's "
            f"(95 % interval {ratio.low:.3f} to {ratio.high:.3f}); it names the teacher's first "
            f"choice for {agreement.value:.1%} of the tokens."
        )
        for control in findings.controls:
            other = findings.table[control][text]["kl"]
            sentences.append(_compare(student["kl"], other, LABELS.get(control, control)))
    sentences += skill_verdicts(findings.skills)
    sentences += _rollbacks(findings.facts["rollbacks"])
    return sentences


def _rollbacks(by_phase: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How often training was taken back, and why."""
    if not any(by_phase.values()):
        return ["Training never ran away."]
    return [
        f"Training ({LABELS.get(phase, phase)}) was taken back from step {back['step']} to "
        f"{back['to_step']}: {back['reason']}."
        for phase, rollbacks in by_phase.items()
        for back in rollbacks
    ]


def _compare(own: Estimate, other: Estimate, name: str) -> str:
    if own.high < other.low:
        verdict = "closer to the teacher than"
    elif own.low > other.high:
        verdict = "FURTHER from the teacher than"
    else:
        verdict = "not clearly closer to the teacher than"
    return f"There it is {verdict} the {name} (KL {own.value:.3f} against {other.value:.3f})."


def markdown(findings: Findings) -> str:
    """The same findings as plain text."""
    lines = [f"# {findings.facts['teacher']} and its student", ""]
    lines += [f"- {sentence}" for sentence in verdicts(findings)]
    for text in findings.texts:
        lines += ["", f"## {text}", "", "| model | perplexity | ratio | KL | agreement |"]
        lines.append("|---|---|---|---|---|")
        for name, texts in findings.table.items():
            cells = [
                texts[text][m].format()
                for m in ("perplexity", "perplexity_ratio", "kl", "agreement")
            ]
            lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
    lines += _skill_table(findings.skills)
    lines += ["", "## Size and speed", "", "| | teacher | student |", "|---|---|---|"]
    for key in findings.speed[TEACHER]:
        values = [findings.speed[name].get(key, float("nan")) for name in (TEACHER, STUDENT)]
        lines.append(f"| {key} | {values[0]:,.2f} | {values[1]:,.2f} |")
    return "\n".join(lines) + "\n"


def _skill_table(skills: dict[str, Skill]) -> list[str]:
    """Lines of a table of skills; none where there are none."""
    if not skills:
        return []
    groups = sorted({group for skill in skills.values() for group in skill.groups})
    heads = ["after", "right", *groups, "own tokens", "p"]
    lines = ["", "## Word problems with tools", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" * len(heads) + "|")
    for name, skill in skills.items():
        p = "" if skill.p_value is None else f"{skill.p_value:.2g}"
        shares = [f"{skill.groups[group].value:.0%}" for group in groups]
        cells = [name, str(skill.right), *shares, f"{skill.own_tokens:.1f}", p]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_drift(drift: dict[str, dict[int, float]]) -> bytes:
    """How far each model's states are from the teacher's, by the teacher's blocks."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(11, 3.2), layout="constrained")
    for name, blocks in drift.items():
        axis.plot(
            list(blocks), list(blocks.values()), "o-", markersize=4,
            color=COLOURS.get(name), label=LABELS.get(name, name),
        )  # fmt: skip
    axis.set(xlabel="block of the teacher", ylim=(0, None))
    axis.set_title(
        "drift: 0 the teacher's states, 1 those of another token", fontsize=10, loc="left"
    )
    axis.legend(frameon=False, fontsize=9)
    return _picture(figure)


def _draw_chart(findings: Findings) -> bytes:
    """Perplexity ratio and KL of the student and its controls, by text, with intervals."""
    pyplot = _pyplot()
    models = [name for name in findings.table if name != TEACHER]
    width = 0.75 / len(models)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    titles = {
        "perplexity_ratio": "perplexity / teacher's",
        "kl": "KL from the teacher (nats a token)",
        "agreement": "top-1 agreement",
    }
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for offset, name in enumerate(models):
            estimates = [findings.table[name][text][measure] for text in findings.texts]
            values = [e.value for e in estimates]
            errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            places = [i + (offset - len(models) / 2 + 0.5) * width for i in range(len(values))]
            axis.bar(
                places,
                values,
                0.96 * width,
                yerr=errors,
                color=COLOURS.get(name),
                label=LABELS.get(name, name),
            )
        axis.set_xticks(range(len(findings.texts)), findings.texts, rotation=20, ha="right")
        axis.set_title(title, fontsize=10, loc="left")
    axes[0].axhline(1, color="black", linewidth=0.8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return _picture(figure)


def _pyplot():
    """matplotlib's plots, drawn to memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _picture(figure) -> bytes:
    """A figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _pyplot().close(figure)
    return buffer.getvalue()


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
