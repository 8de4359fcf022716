"""The retention matrix: what is kept is what the losses say, in numbers, text and picture."""

import math
from pathlib import Path

import pytest

from stages.distill.retention import Retention, draw_retention

FOUND = Retention(("ada", "ben"), ("none", "ada", "ben"), ((2.0, 1.0, 1.5), (3.0, 3.5, 2.0)))


def test_what_is_kept_is_the_perplexity_at_its_best_over_that_now() -> None:
    kept = FOUND.kept()
    assert kept[0] == pytest.approx([math.exp(-1.0), 1.0, math.exp(-0.5)])
    assert kept[1] == pytest.approx([math.exp(-1.0), math.exp(-1.5), 1.0])


def test_metrics_have_every_entry_and_what_is_kept_at_the_end() -> None:
    metrics = FOUND.metrics()
    assert len(metrics) == 8
    assert metrics["retention.ada.after.ben"] == 1.5
    assert metrics["retention.ada.kept"] == pytest.approx(math.exp(-0.5))
    assert metrics["retention.ben.kept"] == 1.0


def test_the_table_has_a_line_a_skill_and_a_column_a_teacher() -> None:
    head, *lines = FOUND.table().splitlines()
    assert head.split() == ["after", "none", "after", "ada", "after", "ben"]
    assert [line.split()[0] for line in lines] == ["ada", "ben"]
    assert lines[0].split()[1:] == ["2.0000", "(36.8%)", "1.0000", "(100.0%)", "1.5000", "(60.7%)"]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_retention(FOUND, "two skills", tmp_path / "retention.png")
    assert (tmp_path / "retention.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
