"""Reports for people: report.html, one self-contained page, and test_report.md, its plain text."""

import base64
from pathlib import Path
from typing import Any

from stages.benchmark.findings import LABELS, STUDENT, Findings
from stages.benchmark.pictures import draw_capabilities, draw_chart, draw_drift
from stages.benchmark.routing import meaning, routing_table, routing_verdicts
from stages.benchmark.scoring import TEACHER, Estimate
from stages.benchmark.skills import Skill, skill_verdicts


def write_reports(findings: Findings, folder: Path) -> None:
    """Write both files."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader = FileSystemLoader(Path(__file__).parent)
    routing = findings.routing
    templates = Environment(loader=loader, autoescape=select_autoescape(["html"]))
    page = templates.get_template("report.html").render(
        f=findings,
        labels=LABELS,
        verdicts=verdicts(findings),
        chart=_embedded(draw_chart(findings)),
        profile=_embedded(findings.profile_picture.read_bytes()),
        drift=_embedded(draw_drift(findings.drift)) if findings.drift else None,
        capabilities=routing and _embedded(draw_capabilities(routing.capabilities)),
        meaning=meaning,
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
    sentences += routing_verdicts(findings.routing) if findings.routing else []
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
    if findings.routing:
        lines += ["", "## Which adapter answers", "", *routing_table(findings.routing.ways)]
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


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
