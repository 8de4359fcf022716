"""What no teacher can be is refused by name at the first block; what can be is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from modeling.answers import logits_of, read_answers
from modeling.blocks import find_units
from modeling.refusals import CannotFollow, count_visits, refuse_unusual
from modeling.streaming import Arrival, Passage
from modeling.teacher import open_teacher
from modeling.weights import Resident
from tests.causal_lms import tiny_model
from tests.modeling.passages import batches_of, exhaust


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def passage_of(model: PreTrainedModel) -> Passage:
    return Passage(model, find_units(model), Resident(model), batches_of(model, [(2, 12), (1, 7)]))


def first(passage: Passage) -> Arrival:
    return next(arrival for arrival in passage.run() if arrival.block >= 0)


UNUSUAL = {
    "hy_v4": r"\(2, 12, 4, 32\) for tokens \(2, 12\)",  # several states a token
    "deepseek_v4": r"\(2, 12, 4, 32\) for tokens \(2, 12\)",
    "gemma3n_text": r"\(4, 2, 12, 32\) for tokens \(2, 12\)",
    "prophetnet": r"\(2, 36, 32\) for tokens \(2, 12\)",  # several tokens ahead
    "cpmant": r"\(2, 20, 32\) for tokens \(2, 12\)",  # a prompt of its own before the text
    "xlnet": r"\(12, 2, 32\) for tokens \(2, 12\)",  # tokens first
    "blt": r"\(2, 12, 32\) for tokens \(2, 12\), .* its width \(None\)",
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_states_that_are_not_one_vector_a_token_are_refused_by_name(family: str) -> None:
    passage = passage_of(tiny_model(family))
    with pytest.raises(CannotFollow, match=f"a {family} cannot be a teacher.*{UNUSUAL[family]}"):
        refuse_unusual(passage, first(passage))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "hrm_text", "gemma3", "zamba2"])
def test_usual_states_are_not_refused(family: str) -> None:
    passage = passage_of(tiny_model(family))
    for arrival in passage.run():
        refuse_unusual(passage, arrival)


@pytest.mark.parametrize("family", ["reformer", "blt"])
def test_a_model_whose_blocks_are_not_alike_is_refused_where_they_are_left_out(family: str) -> None:
    passage = passage_of(tiny_model(family))
    exhaust(passage)
    message = f"the blocks of {type(passage.model).__name__} .* do not all return the same kind"
    for ask in (passage.after_head, passage.visits, lambda: logits_of(passage)):
        with pytest.raises(CannotFollow, match=message):
            ask()
    with pytest.raises(CannotFollow, match=message):
        list(read_answers(passage, 4))


@pytest.mark.parametrize(("family", "visits"), [("llama", 4), ("gpt2", 4), ("hrm_text", 32)])
def test_blocks_are_counted_as_often_as_a_batch_comes_to_them(family: str, visits: int) -> None:
    passage = passage_of(tiny_model(family))
    counted, come = set(), 0
    for arrival in passage.run():
        if arrival.block >= 0:
            counted.add(count_visits(passage, range(len(passage.blocks))))
            come += arrival.batch == 0
    assert counted == {visits} and come == visits


def test_a_block_that_text_does_not_come_to_is_refused_where_it_is_wanted() -> None:
    passage = passage_of(tiny_model("mllama"))
    for arrival in passage.run():
        if arrival.block >= 0:
            assert count_visits(passage, [0, 2]) == 3
            with pytest.raises(CannotFollow, match="passes by block 3 when it reads text alone"):
                count_visits(passage, [0, 3])


def test_a_model_that_states_no_width_is_refused_before_its_weights_are_looked_at(
    tmp_path: Path,
) -> None:
    tiny_model("blt").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a blt cannot be a teacher: it states no hidden_size"):
        open_teacher(tmp_path, "auto", 24, 24)
