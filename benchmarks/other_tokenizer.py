"""A teacher with another tokenizer: its answers, translated, against text that it wrote.

    .venv/bin/python benchmarks/other_tokenizer.py            # minutes; one thread, float32
    .venv/bin/python benchmarks/other_tokenizer.py --teacher-tokens 768 --student-tokens 1536

On Python's documentation, split by document: a teacher with a BPE tokenizer of its own is trained
here, and students (another BPE, half the vocabulary, smaller) from the same start with the same
number of steps and tokens a step, by
    text              cross-entropy on the text
    written           cross-entropy on text that the teacher wrote: sequence-level distillation (Kim
                      and Rush 2016), the usual way where tokenizers differ
    written+text      the same, half of each batch from the text
    translated        the teacher's top 64 on the text, in the student's tokens
                      (modeling/translation.py), no cross-entropy
    translated+text   the same and half as much cross-entropy on the text
Measured on held-out documents: bits a byte, which no tokenizer enters, and KL from the teacher's
whole translated distribution (nats a token). Mean and range over the seeds; core-seconds a student.
Of one teacher and one small corpus, and of students trained for seconds: which way is better at
scale does not follow.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling.losses import TINY, SparseTargets, head_loss
from modeling.token_bytes import Vocabulary, encode_bytes, vocabulary_of
from stages.extract.translating import Translated
from stages.formats.other_tokens import Tongues
from stages.formats.tokens import encode_probe
from stages.prepare.clean import Document
from stages.prepare.pack import pack_rows, split_documents
from stages.prepare.sources import python_docs

ROW_TOKENS, TOP_K, PROMPT_TOKENS = 128, 64, 16
BATCH_ROWS, HELDOUT_ROWS = 8, 64
RATE = 1e-2  # peak


WAYS = {  # weight of the answers, weight of cross-entropy, share of rows that the teacher wrote
    "text": (0.0, 1.0, 0.0),
    "written": (0.0, 1.0, 1.0),
    "written+text": (0.0, 1.0, 0.5),
    "translated": (1.0, 0.0, 0.0),
    "translated+text": (1.0, 0.5, 0.0),
}


@dataclass(frozen=True)
class Reader:
    """A tokenizer and what its tokens stand for."""

    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary


def train_reader(texts: list[str], size: int) -> Reader:
    """A byte-level BPE of `size` tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<end>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    return Reader(tokenizer, vocabulary_of(tokenizer))


def build(reader: Reader, width: int, blocks: int, seed: int) -> LlamaForCausalLM:
    """A random Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 32, num_key_value_heads=width // 32,
        vocab_size=len(reader.vocabulary.tokens), max_position_embeddings=2 * ROW_TOKENS,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=reader.tokenizer.eos_token_id,
        initializer_range=0.06,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def order(rows: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each step's batch, from shuffled passes."""
    generator = np.random.default_rng(seed)
    left = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) < BATCH_ROWS:
            left = generator.permutation(rows)
        yield left[:BATCH_ROWS]
        left = left[BATCH_ROWS:]


def train(model: LlamaForCausalLM, steps: int, rate: float, losses: Iterator) -> None:
    """Take AdamW's steps on what `losses` gives a model."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def text_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Cross-entropy of rows (B, T)."""
    return cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def write(teacher: LlamaForCausalLM, reader: Reader, texts: list[bytes], seed: int) -> list[str]:
    """What the teacher writes after the beginning of each text, and that beginning."""
    torch.manual_seed(seed)
    prompts = [encode_bytes(reader.tokenizer, reader.vocabulary, text)[0] for text in texts]
    prompts = torch.tensor([ids[:PROMPT_TOKENS] for ids in prompts if len(ids) >= PROMPT_TOKENS])
    written = []
    for part in prompts.split(128):
        made = teacher.generate(
            part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0,
            max_new_tokens=ROW_TOKENS - PROMPT_TOKENS, pad_token_id=reader.tokenizer.eos_token_id,
        )  # fmt: skip
        written += reader.tokenizer.batch_decode(made, skip_special_tokens=True)
    return written


@torch.no_grad()
def answer(teacher: LlamaForCausalLM, translated: Translated) -> SparseTargets:
    """What is stored of all rows."""
    parts = []
    for number, row in enumerate(translated.read):
        p = teacher(torch.from_numpy(row.tokens)[None]).logits[0].softmax(-1)
        parts.append(translated.answers_on_row(number, p))
    ids, log_probs, tail = (
        torch.stack([part[name] for part in parts]) for name in ("ids", "log_probs", "tail")
    )
    return SparseTargets(ids.long(), log_probs.float(), tail.float().exp())


def next_of(rows: np.ndarray, targets: SparseTargets) -> tuple[Tensor, SparseTargets]:
    """Labels and targets of all positions that have a next token: B (T - 1) of them."""
    labels = torch.from_numpy(rows[:, 1:]).flatten()
    return labels, targets[:, :-1].each(lambda tensor: tensor.flatten(0, 1))


def hidden_of(model: LlamaForCausalLM, rows: np.ndarray) -> Tensor:
    """Normed states of all positions with a next token: (B (T - 1), D)."""
    return model.model(torch.from_numpy(rows)).last_hidden_state[:, :-1].flatten(0, 1)


def answer_loss(
    model: LlamaForCausalLM, rows: np.ndarray, targets: SparseTargets, kd: float, ce: float
) -> Tensor:
    """As head_loss, which has the head frozen; less the teacher's entropy."""
    labels, targets = next_of(rows, targets)
    log_q = model.lm_head(hidden_of(model, rows)).log_softmax(-1)
    others = log_q.exp().scatter(-1, targets.ids, 0.0).sum(-1).clamp_min(TINY).log()
    listed = (targets.log_probs.exp() * log_q.gather(-1, targets.ids)).sum(-1)
    return ce * cross_entropy(log_q, labels) - kd * (listed + targets.tail * others).mean()


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, reader: Reader, rows: np.ndarray, exam: SparseTargets
) -> tuple[float, float]:
    """Bits a byte and KL on held-out rows."""
    labels, targets = next_of(rows, exam)
    _, kl, ce = head_loss(hidden_of(model, rows), model.lm_head.weight, labels, targets, 1, 0, 1)
    bytes_of_labels = sum(len(reader.vocabulary.tokens[n]) for n in labels.tolist())
    return ce * len(labels) / bytes_of_labels / math.log(2), kl


@dataclass(frozen=True)
class Material:
    """What students learn from and are measured on; row n of `stored` is of row n of `rows`."""

    reader: Reader
    rows: np.ndarray  # (R, T)
    stored: SparseTargets
    written: np.ndarray  # (R', T)
    heldout: np.ndarray
    exam: SparseTargets

    def losses(self, student: LlamaForCausalLM, way: str, steps: int, seed: int) -> Iterator:
        """The loss of each step."""
        kd, ce, share = WAYS[way]
        passes = order(len(self.rows), steps, seed), order(len(self.written), steps, seed + 100)
        for picks, others in zip(*passes, strict=True):
            if kd:
                targets = self.stored[torch.from_numpy(picks)]
                yield answer_loss(student, self.rows[picks], targets, kd, ce)
                continue
            count = round(BATCH_ROWS * share)
            parts = [self.rows[picks[count:]], self.written[others[:count]]]
            yield text_loss(student, torch.from_numpy(np.concatenate(parts)))


def train_teacher(documents: list[Document], reader: Reader, width: int, steps: int):
    """A teacher on rows of its own tokens."""
    began = time.process_time()
    teacher = build(reader, width, 2, 0)
    own = torch.from_numpy(pack_rows(documents, reader.tokenizer, ROW_TOKENS, 0))
    train(teacher, steps, RATE, (text_loss(teacher, own[p]) for p in order(len(own), steps, 0)))
    print(f"teacher: {teacher.num_parameters():,} parameters, {time.process_time() - began:.0f} s")
    return teacher.eval().requires_grad_(False)


def prepare(teacher, big: Reader, small: Reader, splits: dict, most_rows: int) -> Material:
    """Rows, the teacher's answers on them, and what it writes; says what there is."""
    rows = pack_rows(splits["train"], small.tokenizer, ROW_TOKENS, 0)[:most_rows]
    heldout = pack_rows(splits["heldout"], small.tokenizer, ROW_TOKENS, 0)[:HELDOUT_ROWS]
    tongues = Tongues(small.vocabulary, big.tokenizer, big.vocabulary)
    began = time.process_time()
    translated = Translated.of(rows, tongues, TOP_K)
    stored = answer(teacher, translated)
    seconds = time.process_time() - began
    inside = mean(bool(place.before.begun) for row in translated.read for place in row.places)
    print(
        f"targets of {rows.size:,} tokens: {seconds:.0f} s; {inside:.3f} of the positions lie "
        f"inside a teacher's token; tail {stored.tail.mean():.3f}"
    )
    whole = Translated.of(heldout, tongues, len(small.vocabulary.tokens))
    whole = replace(whole, translation=translated.translation)  # what was counted on other rows
    began = time.process_time()
    texts = [small.vocabulary.join(row) for row in rows]
    pieces = enumerate(write(teacher, big, texts, 0))
    documents = [Document("written", str(n), piece) for n, piece in pieces]
    written = pack_rows(documents, small.tokenizer, ROW_TOKENS, 0)
    print(f"written: {written.size:,} tokens, {time.process_time() - began:.0f} s", flush=True)
    return Material(small, rows, stored, written, heldout, answer(teacher, whole))


@torch.no_grad()
def teacher_bits(teacher: LlamaForCausalLM, material: Material, big: Reader) -> float:
    """The teacher's own bits a byte on the held-out rows, in its tokens."""
    nats = count = 0
    for row in material.heldout:
        text = material.reader.vocabulary.join(row)
        ids = torch.tensor([encode_bytes(big.tokenizer, big.vocabulary, text)[0]])
        nats += cross_entropy(teacher(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += len(text)
    return nats / count / math.log(2)


def compare(material: Material, steps: int, seeds: int) -> None:
    """Train students by all ways, and print a table."""
    print("way              bits a byte              KL                       seconds")
    for way in WAYS:
        began, found = time.process_time(), []
        for seed in range(seeds):
            student = build(material.reader, 64, 2, seed)
            train(student, steps, RATE, material.losses(student, way, steps, seed))
            found.append(measure(student, material.reader, material.heldout, material.exam))
        seconds = (time.process_time() - began) / seeds
        columns = (f"{mean(c):.4f} ({min(c):.4f}-{max(c):.4f})" for c in zip(*found, strict=True))
        print(f"{way:15}  {'  '.join(columns)}  {seconds:5.1f}", flush=True)


def main() -> None:
    """Train teacher and students, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--teacher-width", type=int, default=128)
    parser.add_argument("--teacher-tokens", type=int, default=1536)
    parser.add_argument("--student-tokens", type=int, default=768)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=400, help="that students learn from")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    documents = [Document("docs", name, text) for name, text in python_docs(0)]
    splits = split_documents(documents, 0.1, 0.01, seed=0)
    texts = [document.text for document in splits["train"]]
    big = train_reader(texts, options.teacher_tokens)
    small = train_reader(texts[::2], options.student_tokens)
    assert encode_probe(big.tokenizer) != encode_probe(small.tokenizer)
    teacher = train_teacher(splits["train"], big, options.teacher_width, options.teacher_steps)
    material = prepare(teacher, big, small, splits, options.rows)
    print(f"teacher: {teacher_bits(teacher, material, big):.4f} bits a byte", flush=True)
    compare(material, options.steps, options.seeds)


if __name__ == "__main__":
    main()
