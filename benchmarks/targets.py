"""What a byte of targets teaches: the top k with its tail beside draws from the whole distribution.

    .venv/bin/python benchmarks/targets.py                         # some 10 minutes of 2 cores
    .venv/bin/python benchmarks/targets.py --top-k 64 8 --seeds 0 1 --steps 160

The real stages on the real offline teacher, in a folder of their own. For each k, targets are
extracted twice: the top k, and as many draws as take as many bytes a token (found on a few rows,
where fewer draws are the first of more). A student learns from each, from the targets alone (no
text, no anchors), in equal steps on the same batches. Then KL(teacher || student) over the whole
vocabulary and top-1 agreement on held-out rows, with 95 % intervals over rows; and their paired
differences, draws less top k. A seed decides what is drawn, and the order of batches for both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

from modeling.loading import locate, open_model
from modeling.samples import read_samples
from modeling.teacher import open_teacher
from stages.benchmark.scoring import TEACHER, estimate, score_batch
from stages.formats.tokens import read_all_rows, read_rows

PROJECT = Path(__file__).resolve().parent.parent
NAME = "smollm2-135m"
TEXTS = {"python-docs": "heldout", "humaneval": "benchmark"}  # in and out of what is trained on
TRIAL_ROWS, TRIAL_DRAWS = 16, 1024
MEASURES = ("kl", "agree")
STUDENT = Path("artifacts/distill/student")


def main() -> None:
    """Prepare and profile once; extract, distil and measure each kind of targets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--top-k", type=int, nargs="+", default=[64], help="tokens kept (64)")
    add("--seeds", type=int, nargs="+", default=[0], help="(0)")
    add("--steps", type=int, default=80, help="of each distillation (80)")
    add("--rows", type=int, default=16, help="of each text that are measured on (16)")
    add("--folder", type=Path, help="kept, and gone on from (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="targets-") as scratch:
        root = options.folder or Path(scratch)
        begin(root, options.steps)
        print(f"{'targets':<24}seed  bytes" + "".join(f"  {t:<44}" for t in TEXTS))
        print(" " * 35 + f"{'  KL, nats':<24}{'agreement':<22}" * len(TEXTS))
        for k in options.top_k:
            draws = equal_draws(root, k)
            for seed in options.seeds:
                compare(root, k, draws, seed, options.rows)


def begin(root: Path, steps: int) -> None:
    """Make the folder, and do what both kinds of targets need; not again where it is done."""
    root.mkdir(exist_ok=True)
    for name in ("stages", "modeling", "registry", "dvc.yaml"):
        if not (root / name).exists():
            (root / name).symlink_to(PROJECT / name)
    params = yaml.safe_load((PROJECT / "presets" / "laptop.yaml").read_text(encoding="utf-8"))
    params["prepare"] |= {"train_rows": 2 * steps, "heldout_rows": 32}
    params["profile"] |= {"ablation_rows": 4, "control_blocks": 1}
    params["extract"] |= {"anchors": 0}
    params["distill"] |= {
        "steps": steps, "ce_weight": 0.0, "anchor_weight": 0.0, "controls": [],
        "patch_rows": 32,
    }  # fmt: skip
    set_params(root, params)
    for stage in ("prepare", f"profile {NAME}"):
        if not (root / "artifacts" / stage.replace(" ", "/")).is_dir():
            run_stage(root, stage)


def set_params(root: Path, params: dict) -> None:
    """Write params.yaml."""
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def run_stage(root: Path, stage: str) -> dict:
    """Run a stage and give its metrics; ends the program where it fails."""
    command = [sys.executable, "-m", "stages", *stage.split()]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    path = root / "metrics" / f"{stage.replace(' ', '/')}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def equal_draws(root: Path, k: int) -> int:
    """The most draws whose answers take no more bytes a token than the top k, on some rows."""
    rows = torch.from_numpy(read_all_rows(root / "artifacts/prepare", "train", 0))[:TRIAL_ROWS]
    teacher = open_teacher(locate(NAME), "resident", rows.numel(), rows.numel())
    passage = teacher.passage([rows])
    for _ in passage.run():
        pass
    ids = next(read_samples(passage, TRIAL_DRAWS, 0, 0)).ids[::4]  # every fourth position

    def fits(draws: int) -> bool:
        ordered = ids[:, :draws].sort(-1).values
        distinct = 1 + (ordered.diff(dim=-1) != 0).sum(-1).double().mean().item()
        count_bytes = 1 if draws < 256 else 2
        return distinct * (2 + count_bytes) + count_bytes + 2 <= 4 * k + 2

    return max(draws for draws in (*range(1, 64), *range(64, TRIAL_DRAWS + 1, 8)) if fits(draws))


def compare(root: Path, k: int, draws: int, seed: int, rows: int) -> None:
    """Both kinds of targets with one seed, a line each, and one of their differences."""
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    scores = {}
    for name, chosen in (
        (f"top {k}", {"answers": "top_k", "top_k": k}),
        (f"{draws} draws", {"answers": "sampled", "samples": draws}),
    ):
        params["extract"] |= {**chosen, "seed": seed}
        params["distill"]["seed"] = seed
        set_params(root, params)
        extracted = run_stage(root, f"extract {NAME}")
        run_stage(root, "distill")
        scores[name] = score(root, rows)
        size = f"{extracted['answers_bytes_per_token']:.0f}"
        if "distinct_samples" in extracted:
            name += f", {extracted['distinct_samples']:.1f} differ"
        show(f"{name:<24}{seed:>4}{size:>7}", scores[list(scores)[-1]])
    top, sampled = scores.values()
    difference = {key: sampled[key] - top[key] for key in top}
    show(f"{'  draws less top':<35}", difference)


def score(root: Path, rows: int) -> dict[str, Tensor]:
    """Row means of each text and measure, of the student that was trained last."""
    models = {TEACHER: open_model(locate(NAME)), "student": open_model(root / STUDENT)}
    found: dict[str, list[Tensor]] = {f"{t} {m}": [] for t in TEXTS for m in MEASURES}
    for text, split in TEXTS.items():
        tokens = torch.from_numpy(read_rows(root / "artifacts/prepare", split)[text])[:rows]
        for part in tokens.split(4):
            measures = score_batch(models, part)["student"]
            for measure in MEASURES:
                found[f"{text} {measure}"].append(measures[measure])
    return {key: torch.cat(parts) for key, parts in found.items()}


def show(line: str, scores: dict[str, Tensor]) -> None:
    """Print the means and their intervals behind a line's beginning."""
    print(line + "".join(f"  {estimate(v, 1000, 0).format():<22}" for v in scores.values()))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
