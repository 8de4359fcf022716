"""--status: what it says of unfinished work, and of what the student can do."""

import io
import json

from rich.console import Console

from flows.status import CAPABILITIES, show_status
from tests.flows.project import Project


def status(project: Project) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_status(project.root, console)
    return console.file.getvalue()


def test_it_survives_a_curve_that_a_kill_cut_short(finished: Project) -> None:
    work = finished.root / "scratch" / "seed" / "0123456789abcdef"
    work.mkdir(parents=True)
    line = '{"phase": "main", "step": 3, "total": 9, "time_s": 1.0}\n'
    (work / "metrics.jsonl").write_text(line + line[:20])
    assert "main 3/9" in status(finished)


def test_it_shows_what_each_capability_costs_and_is_worth(finished: Project) -> None:
    assert "capabilities" not in status(finished)
    known = {"tier": "pro", "teacher": "smollm2-135m"}
    scores = {"score": 0.812, "score_routed": 0.807, "score_alone": 0.35}
    tools = {"name": "tools", "rank": 16, "bytes": 3 << 20, **scores}
    devops = {"name": "devops", "rank": None, "bytes": None, **dict.fromkeys(scores)}
    manifest = finished.root / CAPABILITIES
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps([known | tools, known | devops]))
    rows = [line for line in status(finished).splitlines() if " pro " in line]
    assert all(word in rows[0] for word in ("tools", "16", "3.0", "81.2%", "80.7%", "35.0%"))
    assert "no adapter" in rows[1] and rows[1].count("not measured") == 3
