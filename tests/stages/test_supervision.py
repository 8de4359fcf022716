"""Conversations as tokens: what is counted, and that no layout changes what is learnt."""

import pytest
import torch

from runtime.prompt import PLAIN, SYSTEM, prompt_tokens
from stages.formats.conversations import Conversation
from stages.learning.finetuning import rows_loss
from stages.learning.supervision import Example, encode, lay_out, pack, share, side_by_side
from tests.characters import character_tokenizer
from tests.tiny import tiny_llama, tiny_mamba

CALL = '<<calc>>{"expression": "6*7"}'
SEGMENTS = (
    ("prompt", "What is 6*7?"),
    ("own", f"Multiply. {CALL}"),
    ("result", "<<result>>42\n"),
    ("own", "FINAL: 42"),
)


def example(length: int, start: int = 0, prompt: int = 2) -> Example:
    """Tokens of a pattern, of which all but the first are counted."""
    tokens = tuple((start + 5 * n) % 97 for n in range(length))
    return Example(tokens, tuple(n >= prompt for n in range(length)))


def counted_text(conversation: Conversation) -> str:
    tokenizer = character_tokenizer()
    found = encode(conversation, tokenizer)
    return tokenizer.decode([t for t, c in zip(found.tokens, found.counted, strict=True) if c])


def test_own_words_and_the_end_are_counted_and_nothing_else() -> None:
    conversation = Conversation("1", "arithmetic", SEGMENTS, "42")
    assert counted_text(conversation) == f"Multiply. {CALL}FINAL: 42<eos>"
    tokenizer = character_tokenizer()
    whole = tokenizer.decode(encode(conversation, tokenizer).tokens)
    assert whole == PLAIN.format(request="What is 6*7?") + conversation.reply + "<eos>"


def test_recited_numbers_are_read_but_not_counted() -> None:
    segments = (("prompt", "6*7?"), ("own", "That is "), ("recited", "42"), ("own", ". FINAL: 42"))
    conversation = Conversation("1", "arithmetic", segments, "42")
    assert counted_text(conversation) == "That is . FINAL: 42<eos>"


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = tokenizer.decode(prompt_tokens("Hi?", tokenizer))
    assert text == f"[system]{SYSTEM}[user]Hi?[assistant]"


@pytest.mark.parametrize("packs", [False, True])
def test_every_layout_has_every_token_once(packs: bool) -> None:
    examples = [example(length, start=length) for length in (3, 9, 5, 5, 8, 2)]
    seen = 0
    for rows in lay_out(examples, 0, 16, packs):
        assert rows.tokens.shape == rows.positions.shape == rows.counted.shape
        assert rows.tokens.numel() <= 16
        seen += int(rows.counted.sum())
    assert seen == sum(sum(e.counted) for e in examples)


def test_rows_are_packed_best_fit_the_longest_first() -> None:
    examples = sorted((example(n) for n in (9, 7, 6, 5, 3, 2)), key=len, reverse=True)
    assert [[len(e) for e in row] for row in pack(examples, 16)] == [[9, 7], [6, 5, 3, 2]]


@pytest.mark.parametrize("packs", [False, True])
def test_the_loss_of_a_batch_is_that_of_its_examples_alone(packs: bool) -> None:
    model = tiny_llama().requires_grad_(True)
    examples = [example(length, start=length) for length in (3, 12, 5, 9, 7)]

    def learn(batches) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = sum(rows_loss(model, rows) for rows in batches)
        total.backward()
        return total.item(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    alone, by_alone = learn([r for e in examples for r in lay_out([e], 0, 16, False)])
    together, by_together = learn(lay_out(examples, 0, 24, packs))
    assert together == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(by_together, by_alone, rtol=1e-4, atol=1e-5)


def test_packed_examples_do_not_see_each_other() -> None:
    """Changing one example changes nothing of the loss of its neighbour."""
    model = tiny_llama()
    counted = example(6, start=3)

    def loss(neighbour: Example) -> float:
        silent = Example(neighbour.tokens, (False,) * len(neighbour))
        (rows,) = lay_out([silent, counted], 0, 16, packs=True)
        return rows_loss(model, rows).item()

    assert loss(example(8, start=1)) == pytest.approx(loss(example(8, start=50)), rel=1e-6)


def test_padding_behind_an_example_changes_nothing_of_a_recurrent_model() -> None:
    model = tiny_mamba()
    short, long = example(4), example(9)
    (both,) = lay_out([short, long], 0, 32, packs=False)
    apart = sum(rows_loss(model, r) for e in (short, long) for r in lay_out([e], 0, 32, False))
    torch.testing.assert_close(rows_loss(model, both), apart, rtol=1e-5, atol=1e-5)


def test_examples_that_begin_alike_have_the_loss_of_examples_alone() -> None:
    model = tiny_llama().requires_grad_(True)
    examples = [example(length, prompt=9) for length in (10, 14, 12)] + [example(6, start=3)]

    def loss_and_gradients(groups) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = sum(rows_loss(model, rows) for rows in groups)
        loss.backward()
        return loss.item(), [p.grad for p in model.model.parameters()]

    alone = loss_and_gradients([rows for e in examples for rows in lay_out([e], 0, 64, False)])
    rows = share(examples)
    assert rows.forest.tokens.shape[1] == 10 + 4 + 2 + 6  # ten tokens are shared by three
    shared = loss_and_gradients([rows])
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


def test_examples_that_begin_alike_are_neighbours_and_most_tokens_is_kept() -> None:
    examples = [example(10, start=start) for start in (1, 2, 1, 2, 1)]
    groups = side_by_side(examples, 15)
    assert sorted(map(sorted, groups)) == [[0, 2, 4], [1, 3]]
    assert sorted(index for group in side_by_side(examples, 20) for index in group) == [*range(5)]
    assert len(side_by_side(examples, 20)) == 1
