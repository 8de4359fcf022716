"""Extract (the seeds' SLI): keep what a teacher answers, so that it need not be there later.

Steps, for all training rows, block by block (modeling/streaming.py):
  1. keep the state behind the first blocks: a student that shares them reads it from here
  2. keep anchor blocks' outputs, only as whitened coordinates in their principal subspaces
     (anchors.py says of which blocks)
  3. at the head, keep the most likely next tokens, their log-probabilities, and the others' mass;
     or tokens drawn from the whole distribution (modeling/samples.py)

A teacher with another tokenizer than the rows' reads the same texts in its own tokens, and its
answers are put into the rows' (modeling/translation.py); it leaves no states, since it has none
where the rows' tokens end.

reads    prepare   training rows
         profile   subspaces
writes   shards of targets (stages/formats/targets.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.memory import ENGINES
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_one_of, require_within

TOP_K, SAMPLED = "top_k", "sampled"
VLLM = "vllm"  # an engine for answers alone
MOST_SAMPLES = (1 << 16) - 1  # what the counts of stages/formats/targets.py can tell


@dataclass(frozen=True)
class Params:
    """The section `extract` of params.yaml; comments and units stand there."""

    answers: str
    top_k: int
    samples: int
    prefix_depth: float
    anchors: int
    batch_rows: int
    shard_rows: int
    engine: str
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, top_k=self.top_k, batch_rows=self.batch_rows, shard_rows=self.shard_rows
        )
        require_at_least(0, anchors=self.anchors, seed=self.seed)
        require_one_of((TOP_K, SAMPLED), answers=self.answers)
        require_within(1, MOST_SAMPLES, samples=self.samples)
        require_within(0.0, 0.9, prefix_depth=self.prefix_depth)
        require_one_of((*ENGINES, VLLM), engine=self.engine)
        if self.engine == VLLM and (self.prefix_depth or self.anchors or self.answers == SAMPLED):
            raise ValueError(
                f"'engine' is '{VLLM}', which gives the most likely next tokens and nothing else; "
                f"set 'prefix_depth' to 0.0, 'anchors' to 0 and 'answers' to {TOP_K}"
            )
        if self.shard_rows % self.batch_rows:
            raise ValueError(
                f"'shard_rows' ({self.shard_rows}) must be a multiple of 'batch_rows' "
                f"({self.batch_rows})"
            )


def run(params: Params, job: Job) -> Metrics:
    """Run the teacher over the training rows; see the module's steps."""
    import torch

    from modeling.loading import locate, open_tokenizer
    from stages.formats.targets import write_header
    from stages.formats.tokens import read_all_rows, same_tokenizer

    check_engine(params)
    prepared, location = job.input("prepare"), locate(job.item)
    tokenizer = open_tokenizer(location)
    rows = torch.from_numpy(read_all_rows(prepared, "train", params.seed))
    keep = by_vllm if params.engine == VLLM else by_blocks
    if not same_tokenizer(prepared, tokenizer):
        check_translatable(params, job.item)
        keep = by_translation
    prefix, anchors = keep(params, location, rows, job)
    fields = {"teacher": job.item, "prefix_blocks": prefix, "anchors": anchors}
    samples = params.samples if params.answers == SAMPLED else 0
    write_header(job.output, samples, **fields, rows=len(rows), row_tokens=rows.shape[1])
    return measure(job.output, rows.numel(), samples, keep is by_translation)


def by_blocks(params: Params, location, rows, job: Job) -> tuple[int, tuple[int, ...]]:
    """Steps 1 to 3 with the model's own forward; gives the prefix and the anchor blocks."""
    from modeling.samples import DRAW_BYTES
    from modeling.teacher import open_teacher
    from stages.extract.anchors import choose_anchors
    from stages.extract.extraction import Extraction
    from stages.extract.harvest import Sampling, Wanted
    from stages.formats.importance import read_importance, read_subspaces, share_of_depth

    batch_tokens = params.batch_rows * rows.shape[1]
    sampling = Sampling(params.samples, params.seed) if params.answers == SAMPLED else None
    kept = sampling.draws * DRAW_BYTES if sampling else 0
    teacher = open_teacher(location, params.engine, batch_tokens, rows.numel(), kept)
    job.say(teacher.plan.sentence)
    blocks = len(teacher.blocks)
    prefix = share_of_depth(params.prefix_depth, blocks)
    check_fit(params, prefix, blocks, teacher.model.get_output_embeddings().weight.shape[0])
    profile = job.input("profile")
    harms, subspaces = [b.harm for b in read_importance(profile)], read_subspaces(profile)
    anchors = choose_anchors(harms, prefix, params.anchors)
    wanted = Wanted(params.top_k, prefix, anchors, subspaces, sampling)
    Extraction(teacher, rows, wanted, params.batch_rows, params.shard_rows, job).run()
    teacher.close()
    return prefix, anchors


def by_vllm(params: Params, location, rows, job: Job) -> tuple[int, tuple[int, ...]]:
    """Step 3 with vLLM; gives that there is no prefix and no anchor block."""
    from modeling.loading import weights_folder
    from modeling.teacher import read_config
    from modeling.vllm_engine import open_vllm
    from stages.extract.extraction import extract_answers

    folder = weights_folder(location)
    vocabulary = read_config(folder).get_text_config().vocab_size
    check_fit(params, 0, 1, vocabulary)
    teacher = open_vllm(folder, params.top_k, params.batch_rows, rows.shape[1])
    job.say("vllm: as asked (answers near to the other engines', not equal to the bit)")
    extract_answers(teacher.answers, rows.split(params.shard_rows), vocabulary, job)
    return 0, ()


def by_translation(params: Params, location, rows, job: Job) -> tuple[int, tuple[int, ...]]:
    """Step 3 of a teacher with another tokenizer; gives that there is no prefix and no anchor."""
    from modeling.loading import open_tokenizer
    from modeling.teacher import open_teacher
    from stages.extract.extraction import Extraction
    from stages.extract.harvest import Wanted
    from stages.extract.translating import Translated
    from stages.formats.importance import read_subspaces
    from stages.formats.other_tokens import open_tongues

    tongues = open_tongues(job.input("prepare"), job.item, open_tokenizer(location))
    check_fit(params, 0, 1, len(tongues.rows.tokens))
    translated = Translated.of(rows.numpy(), tongues, params.top_k)
    given = translated.given
    job.say(
        f"another tokenizer: rows of {rows.shape[1]} tokens are up to {given.shape[1]} of the "
        "teacher's; answers are put into the rows' tokens, no prefix and no anchors are kept"
    )
    teacher = open_teacher(
        location, params.engine, params.batch_rows * given.shape[1], given.numel()
    )
    job.say(teacher.plan.sentence)
    wanted = Wanted(
        params.top_k, 0, (), read_subspaces(job.input("profile")), translated=translated
    )
    Extraction(teacher, given, wanted, params.batch_rows, params.shard_rows, job).run()
    teacher.close()
    return 0, ()


def check_translatable(params: Params, name: str) -> None:
    """Refuse what a teacher with another tokenizer than the rows' cannot give."""
    if params.answers == SAMPLED or params.engine == VLLM:
        wrong = "answers" if params.answers == SAMPLED else "engine"
        raise ValueError(
            f"teacher '{name}' has another tokenizer than the rows, and its answers are put into "
            f"their tokens from its whole distribution, so '{wrong}' cannot be "
            f"'{getattr(params, wrong)}'; set extract.answers to {TOP_K} and extract.engine to auto"
        )


def check_engine(params: Params) -> None:
    """Refuse an engine that this machine does not have."""
    if params.engine == VLLM:
        from modeling.backends import require

        require(VLLM, f"extract.engine '{VLLM}'")


def check_among(sections: Mapping[str, Any]) -> None:
    """The same before anything runs."""
    check_engine(sections["extract"])


def check_fit(params: Params, prefix: int, blocks: int, vocabulary: int) -> None:
    """Refuse parameters that this teacher's shape does not allow."""
    if prefix >= blocks:
        raise ValueError(
            f"'prefix_depth' is {params.prefix_depth:g}, which is all {blocks} blocks of this "
            "teacher; nothing would be left to train: lower it"
        )
    if params.answers == TOP_K and params.top_k > vocabulary:
        raise ValueError(f"'top_k' is {params.top_k}; the teacher has {vocabulary} tokens")


def measure(folder: Path, tokens: int, samples: int, translated: bool) -> Metrics:
    """Sizes in bytes a token, and how much of the teacher's distribution is kept."""

    def bytes_per_token(pattern: str) -> float:
        return round(sum(path.stat().st_size for path in folder.glob(pattern)) / tokens, 1)

    sizes = {
        "tokens": tokens,
        "bytes_per_token": bytes_per_token("*.safetensors"),
        "answers_bytes_per_token": bytes_per_token("answers-*.safetensors"),
    }
    if samples:
        distinct, log_prob = (mean_of(folder, name) for name in ("distinct", "log_prob"))
        return {**sizes, "distinct_samples": round(distinct, 2), "entropy": round(-log_prob, 5)}
    mass = round(1 - mean_of(folder, "tail", exponential=True), 5)
    if translated:
        return {**sizes, "top_k_mass": mass, "from_text": round(mean_of(folder, "from_text"), 5)}
    return {**sizes, "top_k_mass": mass}


def mean_of(folder: Path, name: str, exponential: bool = False) -> float:
    """The mean of one tensor of the answers, read back from all shards, resumed or not."""
    import torch
    from safetensors import safe_open

    parts = []
    for path in sorted(folder.glob("answers-*.safetensors")):
        with safe_open(path, "pt") as shard:
            parts.append(shard.get_tensor(name).float().flatten())
    values = torch.cat(parts)
    return (values.exp() if exponential else values).mean().item()


STAGE = Stage("extract", Params, run, check_among)
