"""A teacher with another tokenizer: its stored targets, aligned, against text that it wrote.

    .venv/bin/python benchmarks/other_tokenizer.py            # minutes; one thread, float32

On Python's documentation, split by document: a teacher with a BPE tokenizer of its own is trained
here, and students (another BPE, half the vocabulary, smaller) from the same start with the same
number of steps and tokens a step, by
    text        cross-entropy on the text
    written     cross-entropy on text that the teacher wrote: sequence-level distillation (Kim and
                Rush 2016), the usual way where tokenizers differ
    aligned     the teacher's stored top 64 on the text (modeling/aligned_loss.py), no cross-entropy
    aligned+    the same and half as much cross-entropy on the text
Measured on held-out documents: bits a byte, which no tokenizer enters, and the KL of aligned_loss
(nats a common boundary, a lower bound of the texts' KL). Mean and range over the seeds.
Of one teacher and one small corpus, and of students trained for seconds: which way is better at
scale does not follow.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling.aligned_loss import aligned_loss
from modeling.aligned_rows import StudentRow, TeacherRow, align_rows
from modeling.alignment import Candidates, find_candidates
from modeling.answers import Answers
from modeling.token_bytes import Vocabulary, encode_bytes, vocabulary_of
from stages.formats.tokens import encode_probe
from stages.prepare.clean import Document
from stages.prepare.pack import pack_rows, split_documents
from stages.prepare.sources import python_docs

ROW_TOKENS, TOP_K, PROMPT_TOKENS = 128, 64, 16
BATCH_ROWS, HELDOUT_ROWS = 8, 64
RATE = 1e-2  # peak
WAYS = {"text": (0.0, 1.0), "written": (0.0, 1.0), "aligned": (1.0, 0.0), "aligned+": (1.0, 0.5)}


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
def store(teacher: LlamaForCausalLM, reader: Reader, texts: list[bytes]) -> list[TeacherRow]:
    """The teacher's answers on rows of bytes, in its own tokens, rounded as targets are stored."""
    stored = []
    for text in texts:
        ids, ends = encode_bytes(reader.tokenizer, reader.vocabulary, text)
        logits = teacher(torch.tensor([ids])).logits[0]
        top = Answers.of(logits, TOP_K).targets()
        following = torch.tensor([*ids[1:], 0])[:, None]
        actual = logits.log_softmax(-1).gather(-1, following)[:, 0]
        kept = (top.log_probs, top.tail.log(), actual)
        log_probs, log_tail, actual = (part.half().float().numpy() for part in kept)
        stored.append(
            TeacherRow(np.array(ids), ends, top.ids.numpy(), log_probs, np.exp(log_tail), actual)
        )
    return stored


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


def batch_of(candidates, reader: Reader, rows: np.ndarray, stored: list[TeacherRow]) -> tuple:
    """Labels and aligned targets of some rows, and where the teacher's mass is."""
    students = [StudentRow(row, reader.vocabulary.ends(row)) for row in rows]
    targets, arrays = align_rows(candidates, students, stored)
    return torch.from_numpy(rows[:, 1:]).flatten(), targets, arrays


def hidden_of(model: LlamaForCausalLM, rows: np.ndarray) -> Tensor:
    """Normed states of all positions with a next token: (B (T - 1), D)."""
    return model.model(torch.from_numpy(rows)).last_hidden_state[:, :-1].flatten(0, 1)


@torch.no_grad()
def measure(model: LlamaForCausalLM, reader: Reader, rows: np.ndarray, batch: tuple) -> tuple:
    """Bits a byte and KL on held-out rows."""
    labels, targets, _ = batch
    loss = aligned_loss(hidden_of(model, rows), model.lm_head.weight, labels, targets, 1, 0, 1)
    bytes_of_labels = sum(len(reader.vocabulary.tokens[n]) for n in labels.tolist())
    return loss[2] * len(labels) / bytes_of_labels / math.log(2), loss[1]


@dataclass(frozen=True)
class Material:
    """What students learn from and are measured on; row n of `stored` is of row n of `rows`."""

    reader: Reader
    candidates: Candidates
    rows: np.ndarray  # (R, T)
    stored: list[TeacherRow]
    written: np.ndarray  # (R', T)
    heldout: np.ndarray
    exam: tuple

    def losses(self, student: LlamaForCausalLM, way: str, steps: int, seed: int) -> Iterator:
        """The loss of each step."""
        source = self.written if way == "written" else self.rows
        kd, ce = WAYS[way]
        for picks in order(len(source), steps, seed):
            if not kd:
                yield text_loss(student, torch.from_numpy(source[picks]))
                continue
            chosen = [self.stored[pick] for pick in picks]
            labels, targets, _ = batch_of(self.candidates, self.reader, source[picks], chosen)
            hidden = hidden_of(student, source[picks])
            yield aligned_loss(hidden, student.lm_head.weight, labels, targets, kd, ce, 1.0)[0]


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
    candidates = find_candidates(big.vocabulary, small.vocabulary)
    rows = pack_rows(splits["train"], small.tokenizer, ROW_TOKENS, 0)[:most_rows]
    heldout = pack_rows(splits["heldout"], small.tokenizer, ROW_TOKENS, 0)[:HELDOUT_ROWS]
    texts = [[small.vocabulary.join(row) for row in part] for part in (rows, heldout)]
    began = time.process_time()
    stored, examined = (store(teacher, big, part) for part in texts)
    print(f"targets of {rows.size:,} tokens: {time.process_time() - began:.0f} s")
    exam = batch_of(candidates, small, heldout, examined)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in exam[2].shares().items())
    share = len(exam[1].positions) / exam[0].numel()
    print(f"common boundaries: {share:.3f} of positions; mass: {shares}")
    nats = -sum(row.next_log_prob[:-1].sum() for row in examined)
    count = sum(row.ends[-1] - row.ends[0] for row in examined)
    print(f"teacher: {nats / count / math.log(2):.4f} bits a byte")
    began = time.process_time()
    pieces = enumerate(write(teacher, big, texts[0], 0))
    documents = [Document("written", str(n), piece) for n, piece in pieces]
    written = pack_rows(documents, small.tokenizer, ROW_TOKENS, 0)
    print(f"written: {written.size:,} tokens, {time.process_time() - began:.0f} s", flush=True)
    return Material(small, candidates, rows, stored, written, heldout, exam)


def main() -> None:
    """Train teacher and students, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--teacher-width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=400, help="that students learn from")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    documents = [Document("docs", name, text) for name, text in python_docs(0)]
    splits = split_documents(documents, 0.1, 0.01, seed=0)
    texts = [document.text for document in splits["train"]]
    big, small = train_reader(texts, 1536), train_reader(texts[::2], 768)
    assert encode_probe(big.tokenizer) != encode_probe(small.tokenizer)
    teacher = train_teacher(splits["train"], big, options.teacher_width, options.teacher_steps)
    material = prepare(teacher, big, small, splits, options.rows)
    print("way        bits a byte              KL                       seconds")
    for way in WAYS:
        began, found = time.process_time(), []
        for seed in range(options.seeds):
            student = build(small, 64, 2, seed)
            train(student, options.steps, RATE, material.losses(student, way, options.steps, seed))
            found.append(measure(student, small, material.heldout, material.exam))
        seconds = (time.process_time() - began) / options.seeds
        columns = (f"{mean(c):.4f} ({min(c):.4f}-{max(c):.4f})" for c in zip(*found, strict=True))
        print(f"{way:9}  {'  '.join(columns)}  {seconds:5.1f}", flush=True)


if __name__ == "__main__":
    main()
