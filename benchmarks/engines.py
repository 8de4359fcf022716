"""One engine's run for benchmarks/streaming.py, which starts this: engines.py JOB (in JSON).

Writes what the engine gave (ids, log_probs, tail: .npy, hidden.N.bf16) and what was measured from
just before opening to the end (measured.json) into the folder job["out"].
"""

import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from random_models import SHAPES, drop_pages

from stages.process import die_with_parent, keep_freed_memory, spin_briefly

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modeling.answers import Answers
    from modeling.losses import SparseTargets

TOP = 64
SAMPLE_S = 0.02


def main() -> None:
    """Run an engine and write what it gave and took."""
    die_with_parent()
    spin_briefly()
    keep_freed_memory()
    job = SimpleNamespace(**json.loads(sys.argv[1]))
    limited = limit_memory(job)
    import_all(job.engine)
    import torch

    if job.engine == "split":
        open_airllm(job)
        (Path(job.split) / "complete").touch()
        return
    shape = SHAPES[job.size]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(shape.vocabulary, (job.sequences, job.tokens), generator=generator)
    batches = rows.split(job.rows)
    kept = Kept(Path(job.out), shape.blocks)
    meter = Meter()
    if job.engine == "ours":
        run_ours(job, batches, kept)
    else:
        model = OPENERS[job.engine](job)
        if job.engine == "ram":
            meter.restart()
        run_by_batches(job, model, batches, kept)
    kept.close()
    measured = {**meter.stop(), "limit": limited}
    (Path(job.out) / "measured.json").write_text(json.dumps(measured))


def limit_memory(job: SimpleNamespace) -> str:
    """Go into the job's cgroup, or take a limit on data; says which."""
    if not job.limit:
        return ""
    if job.cgroup:
        (Path(job.cgroup) / "cgroup.procs").write_text(str(os.getpid()))
        return f"{job.limit} GiB of memory, page cache counted (cgroup {job.cgroup})"
    resource.setrlimit(resource.RLIMIT_DATA, (int(job.limit * (1 << 30)),) * 2)
    return f"{job.limit} GiB of data (RLIMIT_DATA; no cgroup could be made)"


def import_all(engine: str) -> None:
    """Import what any engine needs, and what this one does, so that no import is measured."""
    import transformers

    import modeling.answers
    import modeling.teacher

    assert modeling.answers and modeling.teacher and transformers.LlamaForCausalLM
    if engine in ("airllm", "split"):
        import airllm

        assert airllm.AirLLMBaseModel
    elif engine == "accelerate":
        import accelerate

        assert accelerate.dispatch_model


class Meter:
    """What this process takes from `restart` on: seconds, bytes read, and anonymous memory."""

    def __init__(self) -> None:
        self._baseline = self._peak = anonymous_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self.restart()

    def restart(self) -> None:
        """Count wall seconds, processor seconds and bytes read from here on."""
        self._wall, self._cpu, self._read = time.monotonic(), cpu_seconds(), read_bytes()

    def stop(self) -> dict[str, float]:
        """What was taken."""
        taken = {
            "wall": time.monotonic() - self._wall,
            "cpu": cpu_seconds() - self._cpu,
            "read": read_bytes() - self._read,
        }
        self._stopped.set()
        self._thread.join()
        return {**taken, "peak": self._peak, "baseline": self._baseline}

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory that is no file's: RssAnon, and RssShmem for shared anonymous mappings."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(size) for size in sizes) * 1024


def read_bytes() -> int:
    """Bytes that this process has had fetched from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("read_bytes:"))
    return int(line.split()[1])


def cpu_seconds() -> float:
    """Processor time of all threads, the kernel's part too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Kept:
    """What every engine has to give, written to files: answers, and states behind three blocks."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self._folder = folder
        places = dict(enumerate((blocks // 4, blocks // 2, blocks - 1)))
        self._files = {b: (folder / f"hidden.{n}.bf16").open("wb") for n, b in places.items()}
        self._answers: list[SparseTargets] = []

    @property
    def blocks(self) -> Iterable[int]:
        """The blocks whose states are wanted."""
        return self._files.keys()

    def hidden(self, block: int, states: "Tensor") -> None:
        """Take a batch's states behind a block, if it is one of the three."""
        import torch

        if block in self._files:
            raw = states.bfloat16().contiguous().view(torch.int16)
            self._files[block].write(memoryview(raw.numpy()))

    def answers(self, answers: "Answers") -> None:
        """Take a batch's answers."""
        self._answers.append(answers.targets())

    def close(self) -> None:
        """Write what is not written yet."""
        import numpy

        for file in self._files.values():
            file.close()
        for what in ("ids", "log_probs", "tail"):
            values = [getattr(answers, what).numpy() for answers in self._answers]
            numpy.save(self._folder / f"{what}.npy", numpy.concatenate(values))


def run_ours(job: SimpleNamespace, batches: Sequence["Tensor"], kept: Kept) -> None:
    """Every batch through one block, then through the next."""
    from modeling.answers import read_answers
    from modeling.teacher import open_teacher

    tokens = job.sequences * job.tokens
    teacher = open_teacher(Path(job.model), "streamed", job.rows * job.tokens, tokens)
    passage = teacher.passage(batches)
    for arrival in passage.run():
        kept.hidden(arrival.block, arrival.hidden)
    for answers in read_answers(passage, TOP):
        kept.answers(answers)


def run_by_batches(
    job: SimpleNamespace, model: "nn.Module", batches: Sequence["Tensor"], kept: Kept
) -> None:
    """One batch through the whole model, then the next."""
    import torch

    from modeling.answers import Answers

    def keep(index: int, output: "Tensor | tuple") -> None:
        kept.hidden(index, output[0] if isinstance(output, tuple) else output)

    for index in kept.blocks:
        block = model.get_submodule(f"model.layers.{index}")
        block.register_forward_hook(lambda _, __, output, index=index: keep(index, output))
    for number, batch in enumerate(batches):
        if number and job.evict and job.engine != "ram":
            drop_pages(Path(job.model), Path(job.split))
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        kept.answers(Answers.of(logits.flatten(0, 1), TOP))


def open_accelerate(job: SimpleNamespace) -> "nn.Module":
    """All blocks on disk, read where they lie; the rest in memory."""
    from transformers import AutoModelForCausalLM

    rest = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    blocks = [f"model.layers.{index}" for index in range(SHAPES[job.size].blocks)]
    places = {**dict.fromkeys(rest, "cpu"), **dict.fromkeys(blocks, "disk")}
    return AutoModelForCausalLM.from_pretrained(
        job.model, dtype=fast_dtype(), device_map=places, offload_folder=f"{job.out}/offload"
    ).eval()


def open_airllm(job: SimpleNamespace) -> "nn.Module":
    """AirLLM's wrapper, from its own copy of the checkpoint, which it makes where there is none."""
    from airllm import AirLLMBaseModel

    class NoTokenizer(AirLLMBaseModel):
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            """Random models have none."""

    return NoTokenizer(job.model, device="cpu", layer_shards_saving_path=job.split).model


def open_ram(job: SimpleNamespace) -> "nn.Module":
    """All weights in memory; they are mapped, so each page is touched once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=fast_dtype()).eval()
    for parameter in model.parameters():
        parameter.detach().flatten()[:: mmap.PAGESIZE // 2].sum()
    return model


def fast_dtype() -> "torch.dtype":
    """What ours computes in on this machine."""
    import torch

    from modeling.backends import compute_dtype

    return compute_dtype(torch.device("cpu"))


OPENERS = {"accelerate": open_accelerate, "airllm": open_airllm, "ram": open_ram}

if __name__ == "__main__":
    main()
