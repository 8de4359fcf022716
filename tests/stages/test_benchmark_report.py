"""The reports: one page that needs nothing else, the same numbers in both, and words that fit."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.benchmark.findings import LABELS, Findings
from stages.benchmark.report import markdown, verdicts, write_reports
from stages.benchmark.scoring import TEACHER, Estimate

MODELS = (TEACHER, "student", "before_training", "text_only")
TEXTS = ("python-docs", "arithmetic", "humaneval")
MEASURES = ("perplexity", "perplexity_ratio", "kl", "agreement")
SPEED = {"forward_tokens_per_s": 1234.5, "decode_tokens_per_s": 21.25, "parameters": 134515008}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def around(value: float, width: float = 0.01) -> Estimate:
    return Estimate(value, value - width, value + width)


def findings(folder: Path, models: tuple[str, ...] = MODELS, teacher: str = "ada") -> Findings:
    """Numbers of which each is there once, so that one in the wrong place is seen."""
    (folder / "profile.png").write_bytes(PNG)
    number, table = 1.0, {}
    for model in models:
        table[model] = {}
        for text in TEXTS:
            table[model][text] = {}
            for measure in MEASURES:
                number += 0.037
                table[model][text][measure] = around(number)
    speed = {
        name: {key: value * n for key, value in SPEED.items()}
        for n, name in enumerate(models[:2], 1)
    }
    facts = {"teacher": teacher, "dropped": [12, 13, 17], "rollbacks": {"student": []}}
    return Findings(facts, table, speed, folder / "profile.png")


class Page(HTMLParser):
    """What a page refers to, its pictures, its text by cell and row, and tags left open."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "data", "srcset", "action", "poster"):
                (self.pictures if value.startswith("data:") else self.links).append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    write_reports(findings(tmp_path), tmp_path)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


# --- the page --------------------------------------------------------------------------------


def test_the_page_fetches_nothing(page: Page, tmp_path: Path) -> None:
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.links == [] and not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", re.sub(r"data:[^\"]*", "", text))
    assert page.open == []


def test_its_pictures_are_in_it_and_are_pictures(page: Page) -> None:
    assert len(page.pictures) == 2
    for picture in page.pictures:
        head, _, content = picture.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG\r\n")
    assert base64.b64decode(page.pictures[1].partition(",")[2]) == PNG


def test_every_model_and_every_text_is_in_it(page: Page, tmp_path: Path) -> None:
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in TEXTS:
        assert f"<h2>{name}</h2>" in text
    labels = [row[0] for row in page.rows]
    for model in MODELS:
        assert labels.count(LABELS[model]) == len(TEXTS)


def test_a_table_has_the_number_of_its_model_text_and_measure(page: Page, tmp_path: Path) -> None:
    table = findings(tmp_path).table
    named = [row for row in page.rows if row[0] in LABELS.values()]
    expected = [
        [LABELS[model], *(table[model][text][measure].format() for measure in MEASURES)]
        for text in TEXTS
        for model in MODELS
    ]
    assert [[" ".join(cell.split()) for cell in row] for row in named] == expected


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    write_reports(findings(tmp_path, teacher="<script>alert(1)</script>"), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("models", [MODELS[:2], MODELS[:3], (*MODELS, "another")])
def test_there_may_be_fewer_controls_or_more(tmp_path: Path, models: tuple[str, ...]) -> None:
    write_reports(findings(tmp_path, models), tmp_path)
    rows = Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows
    for model in models:
        assert [row[0] for row in rows].count(LABELS.get(model, model)) == len(TEXTS)


def test_drift_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    found = replace(findings(tmp_path), drift={"student": {0: 0.0, 3: 0.1}, "another": {0: 0.2}})
    write_reports(found, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.pictures) == 3


# --- both reports ----------------------------------------------------------------------------


def test_the_plain_text_has_the_same_tables(page: Page, tmp_path: Path) -> None:
    lines = (tmp_path / "test_report.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    plain = [row for row in rows if set(row[0]) != {"-"}]
    shown = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert [[cell.replace("_", " ") for cell in row] for row in plain] == shown


def test_the_plain_text_has_the_same_sentences(tmp_path: Path) -> None:
    found = findings(tmp_path)
    write_reports(found, tmp_path)
    text = (tmp_path / "test_report.md").read_text(encoding="utf-8")
    assert text == markdown(found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert len(verdicts(found)) == 3 * len(TEXTS) + 1
    for sentence in verdicts(found):
        assert f"- {sentence}\n" in text
        assert f"<li>{sentence}</li>" in page


# --- verdicts --------------------------------------------------------------------------------

WORDS = {
    "closer": "closer to the teacher than the",
    "unclear": "not clearly closer to the teacher than the",
    "further": "FURTHER from the teacher than the",
}


@pytest.mark.parametrize(
    ("student", "control", "verdict"),
    [
        (around(0.2), around(0.4), "closer"),
        (around(0.4), around(0.2), "further"),
        (around(0.30), around(0.31), "unclear"),
        (around(0.31), around(0.30), "unclear"),
        (around(0.3, 0.2), around(0.45, 0.01), "unclear"),  # the interval of one holds the other
        (Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.3, 0.5), "unclear"),  # they only touch
        (around(0.3, 0.0), around(0.3, 0.0), "unclear"),
    ],
)
@pytest.mark.parametrize("name", ["before_training", "text_only"])
def test_a_verdict_says_no_more_than_the_intervals_do(
    tmp_path: Path, student: Estimate, control: Estimate, verdict: str, name: str
) -> None:
    found = findings(tmp_path, (TEACHER, "student", name))
    for text in TEXTS:
        found.table["student"][text]["kl"] = student
        found.table[name][text]["kl"] = control
    sentences = [sentence for sentence in verdicts(found) if LABELS[name] in sentence]
    assert len(sentences) == len(TEXTS)
    for sentence in sentences:
        assert f"it is {WORDS[verdict]} {LABELS[name]}" in sentence
        assert f"KL {student.value:.3f} against {control.value:.3f}" in sentence


def test_the_first_sentence_on_a_text_gives_ratio_and_agreement(tmp_path: Path) -> None:
    found = findings(tmp_path, MODELS[:2])
    found.table["student"]["arithmetic"] |= {
        "perplexity_ratio": Estimate(1.25, 1.125, 1.375), "agreement": Estimate(0.875, 0.8, 0.9),
    }  # fmt: skip
    sentences = verdicts(found)
    assert [sentence.split()[1] for sentence in sentences[:-1]] == list(TEXTS)
    assert "1.250 times" in sentences[1] and "1.125 to 1.375" in sentences[1]
    assert "87.5%" in sentences[1]


def test_every_rollback_is_told_with_its_reason(tmp_path: Path) -> None:
    calm = findings(tmp_path)
    assert "Training never ran away." in verdicts(calm)
    back = {"step": 41, "to_step": 40, "reason": "the loss is nan"}
    told = replace(calm, facts={**calm.facts, "rollbacks": {"student": [back, back]}})
    sentences = [s for s in verdicts(told) if "taken back" in s]
    assert len(sentences) == 2 and "step 41 to 40: the loss is nan" in sentences[0]
