"""Conversations that teach skills: made by our own code, or from the rows of a hub dataset.

make     a function a data set: conversations to train on, and others to measure with
clean    no request twice; nothing that shares 13 words with a benchmark or a held-out request
mask     numbers that could only be recited (number_masking.py of stages/learning/),
         where that is asked for
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from registry.catalog import lookup
from registry.strict import strict_yaml
from stages.contract import Job, Metrics
from stages.formats.conversations import Conversation, write_conversations
from stages.learning.number_masking import mask_recited
from stages.prepare.clean import Document, drop_contaminated, drop_exact_duplicates
from stages.prepare.gsm8k import conversation_of
from stages.prepare.interface_texts import german_interface
from stages.prepare.python_skills import python_code, python_questions
from stages.prepare.react import react_traces
from stages.prepare.small_talk import small_talk
from stages.prepare.sources import read_rows
from stages.prepare.splits import Made, Rows, Wanted, digest, hold_out
from stages.prepare.traces import in_the_head
from stages.prepare.word_problems import heldout_problems, training_problems

RESULT_LINES = ("{} is the result.", "That makes {}.", "{} it is.", "The result is {}.")


def arithmetic_tools(wanted: Wanted, rows: Rows) -> Made:
    """Word problems from templates; held-out templates are never trained on."""
    del rows
    train = list(islice(training_problems(wanted.seed), wanted.train))
    return train, heldout_problems(wanted.heldout, wanted.seed)


def arithmetic_plain(wanted: Wanted, rows: Rows) -> Made:
    """Other word problems, worked out in the head: the model may find where a call helps."""
    made = arithmetic_tools(replace(wanted, seed=wanted.seed + 1), rows)
    train, heldout = (
        [
            replace(told, id=f"plain/{told.id}", segments=in_the_head(told.segments, line))
            for told, line in zip(part, cycle(RESULT_LINES), strict=False)
        ]
        for part in made
    )
    return train, heldout


def gsm8k_tools(wanted: Wanted, rows: Rows) -> Made:
    """GSM8K's training problems with their annotations as calls."""
    found = (conversation_of(row["question"], row["answer"]) for row in rows)
    return hold_out([told for told in found if told], wanted)


def react_tools(wanted: Wanted, rows: Rows) -> Made:
    """Tool use in Thought, Action and Observation; held-out questions are worded otherwise."""
    del rows
    train = react_traces("training", wanted.train, wanted.seed)
    return train, react_traces("heldout", wanted.heldout, wanted.seed)


def devops(wanted: Wanted, rows: Rows) -> Made:
    """Instructions and answers about running software, written for this project."""
    del rows
    topics = strict_yaml(Path(__file__).with_name("devops.yaml"))
    told = [
        Conversation(
            id=digest(entry["ask"])[:16],
            capability="devops",
            segments=(("prompt", entry["ask"]), ("own", entry["answer"])),
            answer=None,
            facts={"topic": topic},
        )
        for topic, entries in topics.items()
        for entry in entries
    ]
    return hold_out(told, wanted)


CONVERSATION_SOURCES: dict[str, Callable[[Wanted, Rows], Made]] = {
    "arithmetic_tools": arithmetic_tools,
    "arithmetic_plain": arithmetic_plain,
    "gsm8k_tools": gsm8k_tools,
    "react_tools": react_tools,
    "devops": devops,
    "python_code": python_code,
    "python_questions": python_questions,
    "small_talk": small_talk,
    "german_interface": german_interface,
}


def prepare_skill(
    name: str, wanted: Wanted, masking: bool, benchmarks: list[Document], job: Job
) -> Metrics:
    """Make, clean and write the conversations of one data set; give counts."""
    entry = lookup("datasets", name)
    rows = read_rows(entry) if entry.source.hub else ()
    made, heldout = CONVERSATION_SOURCES[entry.source.conversations](wanted, rows)
    train, dropped = clean_conversations(name, made, heldout, benchmarks)
    if not train or not heldout:
        raise ValueError(
            f"data set '{name}' gave {len(train)} conversations to train on and {len(heldout)} to "
            "measure with; raise prepare.train_conversations and prepare.heldout_conversations"
        )
    for split, conversations in (("train", train), ("heldout", heldout)):
        masked = map(mask_recited, conversations) if masking else conversations
        write_conversations(job.output, name, split, masked)
    return {
        f"conversations_{name}_train": len(train),
        f"conversations_{name}_heldout": len(heldout),
        f"conversations_{name}_dropped": dropped,
    }


def clean_conversations(
    name: str, train: list[Conversation], heldout: list[Conversation], benchmarks: list[Document]
) -> tuple[list[Conversation], int]:
    """Drop repeated requests and what is measured with; give the rest, and how many went.

    Requests made from one template are alike on purpose, so that only exact repetition counts.
    """
    requests = drop_exact_duplicates([Document(name, told.id, told.prompt) for told in train])
    measured = [Document("heldout", told.id, told.prompt) for told in heldout]
    fresh, _ = drop_contaminated(requests, measured)
    kept = {document.id for document in fresh}
    whole = [
        Document(name, told.id, f"{told.prompt}\n{told.reply}") for told in train if told.id in kept
    ]
    clean, _ = drop_contaminated(whole, benchmarks)
    kept = {document.id for document in clean}
    return [told for told in train if told.id in kept], len(train) - len(kept)
