"""How long stages will take and how much memory: what they took here last time, else the preset's
figure, which holds for two cores with units for bfloat16 (AMX), or for a GPU."""

import json
import platform
from pathlib import Path
from typing import Any

from flows.console import duration
from flows.plan import Node

LEDGER = Path("scratch") / "last_runs.json"
UNKNOWN = {"seconds": 60, "gib": 1.0}  # a stage that the preset says nothing of
WITHOUT_UNITS = 4.0  # times as long; measured on two cores with AVX2 alone, float32
CPU, GPU = Path("/proc/cpuinfo"), Path("/dev/nvidia0")


def expectations(root: Path, params: dict[str, Any], nodes: list[Node]) -> dict[str, Any]:
    """Time and memory of each node, as numbers and as text ("~": not measured here)."""
    ledger = read_ledger(root)
    slower = slowness()
    known: dict[str, Any] = {}
    for node in nodes:
        last = ledger.get(f"{params['preset']}/{node.name}")
        figure = last or params["pipeline"]["expected"].get(node.stage, UNKNOWN)
        seconds = figure["seconds"] * (1.0 if last else slower)
        mark = "" if last else "~ "
        known[node.name] = {
            "seconds": seconds,
            "time": mark + duration(seconds),
            "memory": f"{mark}{figure['gib']:.1f} GiB",
        }
    return known


def slowness() -> float:
    """How many times as long as on the presets' machine a stage takes on this one, about."""
    if GPU.exists() or platform.machine() == "arm64" or not CPU.is_file():
        return 1.0
    return 1.0 if "bf16" in CPU.read_text("utf-8") else WITHOUT_UNITS


def read_ledger(root: Path) -> dict[str, Any]:
    """What each stage took the last time it ran here."""
    path = root / LEDGER
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # none yet, or cut short by a kill
        return {}


def note_usage(root: Path, preset: str, name: str, seconds: float) -> None:
    """Remember what a node took, and the memory that its result.json says."""
    result = root / "scratch" / name / "last" / "result.json"
    measured = json.loads(result.read_text(encoding="utf-8"))["measured"]
    ledger = read_ledger(root)
    ledger[f"{preset}/{name}"] = {
        "seconds": round(seconds, 1),
        "gib": measured["peak_memory_gib"],
    }
    part = root / LEDGER.with_suffix(".part")
    part.write_text(json.dumps(ledger, indent=1), encoding="utf-8")
    part.replace(root / LEDGER)
