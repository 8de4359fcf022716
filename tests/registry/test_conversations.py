"""Data sets of conversations: told from texts, and contradictions about them refused."""

import pytest

from registry.catalog import lookup, names
from registry.records import Dataset, Source


def test_conversations_are_tagged_as_skills() -> None:
    for dataset in (lookup("datasets", name) for name in names("datasets")):
        assert ("skills" in dataset.tags) == dataset.teaches_by_conversations, dataset.name


def test_conversations_from_a_hub_need_no_template() -> None:
    source = Source(hub="a/b", split="train", file="b/train.jsonl", conversations="made_of_rows")
    dataset = Dataset("told", source, None, "MIT", "text", ("skills",), False, "Told.")
    assert dataset.teaches_by_conversations


def test_a_template_for_conversations_is_refused() -> None:
    source = Source(conversations="made_here")
    with pytest.raises(ValueError, match="set 'text' to null"):
        Dataset("told", source, "{question}", "MIT", "text", ("skills",), False, "Told.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"python": "a", "conversations": "b"}, "stands alone"),
        ({"python": "a", "file": "a.jsonl"}, "belong to a hub source"),
        ({"conversations": "a", "split": "train"}, "belong to a hub source"),
        ({"file": "a.jsonl"}, "exactly one of"),
    ],
)
def test_sources_that_contradict_themselves_are_refused(
    fields: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**fields)
