"""Dynamic symbols: they are read, expanded and counted honestly, whatever a model writes."""

import pytest

from runtime.symbols import BUDGET_TOKENS, LONGEST_MEANING, read_symbols


def count(text: str) -> int:
    return len(text.split())


MEAN = "<define symbol=M: the mean of both>"  # 7 tokens; the definition has 4


def test_a_symbol_is_expanded_for_the_reader_and_its_definition_left_out() -> None:
    read = read_symbols(f"{MEAN}\nTake M. Then (M) again, not AM, M2 or m.", count)
    expected = "Take the mean of both. Then (the mean of both) again, not AM, M2 or m."
    assert read.expanded() == expected
    assert read.in_force["M"].definition == "the mean of both" and not read.faults


def test_text_without_symbols_stays_as_it_is() -> None:
    read = read_symbols("a <b> and X: 3 < 4", count)
    assert read.expanded() == "a <b> and X: 3 < 4"
    assert read.compression(count).net_tokens == 0


@pytest.mark.parametrize(("uses", "net"), [(0, -6), (1, -3), (2, 0), (3, 3), (10, 24)])
def test_compression_counts_the_definition_too(uses: int, net: int) -> None:
    text = MEAN + " then M" * uses
    compression = read_symbols(text, count).compression(count)
    assert (compression.uses, compression.net_tokens) == (uses, net)


@pytest.mark.parametrize("uses", [0, 1, 4])
def test_what_is_saved_is_what_the_reader_gets_more(uses: int) -> None:
    text = f"First {MEAN} comes" + " then M" * uses
    read = read_symbols(text, count)
    assert read.compression(count).net_tokens == count(read.expanded()) - count(text)


def test_repeating_a_symbol_on_the_spot_saves_nothing_more() -> None:
    for stutter in ("M M M M", "M, M; M\nM", "M M"):
        assert read_symbols(f"{MEAN} {stutter}", count).compression(count).uses == 1
    assert read_symbols(f"{MEAN} M and M", count).compression(count).uses == 2


def test_a_use_before_the_definition_is_none() -> None:
    read = read_symbols(f"M is M. {MEAN} M", count)
    assert read.compression(count).uses == 1
    assert read.expanded().startswith("M is M.")


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("<define symbol=X: not closed", "not closed"),
        ("<define symbol=X: broken\noff>", "not closed"),
        ("<define X: no symbol>", "not of the form"),
        ("<define symbol=X no colon>", "not of the form"),
        ("<define>", "not of the form"),
        ("<define symbol=: nameless>", "'' is no name"),
        ("<define symbol=the: a common word>", "'the' is no name"),
        ("<define symbol=ÜX: a letter of its own>", "is no name"),
        ("<define symbol=ABCDEFGHI: nine letters>", "is no name"),
        ("<define symbol=X:>", "no definition"),
        ("<define symbol=X:   >", "no definition"),
    ],
)
def test_a_malformed_definition_is_reported_and_defines_nothing(statement: str, error: str) -> None:
    read = read_symbols(f"So: {statement} X X", count)
    (fault,) = read.faults
    assert error in fault.error and fault.position == 4
    assert not read.in_force
    compression = read.compression(count)
    assert compression.saved_tokens == 0 and compression.cost_tokens > 0, "it took its tokens"


def test_definitions_have_a_budget_in_all() -> None:
    first = f"<define symbol=A: {'word ' * 30}>"
    second = f"<define symbol=B: {'word ' * 30}>"
    third = "<define symbol=C: a few words>"
    read = read_symbols(first + second + third, count)
    assert list(read.in_force) == ["A", "C"]
    assert "tokens of the" in read.faults[0].error
    assert read.compression(count).cost_tokens == sum(map(count, (first, second, third)))
    assert not read_symbols(first, count, budget=10).in_force
    assert BUDGET_TOKENS == 50


def test_a_symbol_keeps_its_meaning() -> None:
    read = read_symbols(f"{MEAN} M <define symbol=M: something else> M", count)
    assert "already" in read.faults[0].error
    assert read.expanded().split() == ["the", "mean", "of", "both"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "<define symbol=X: X and X>",
        "<define symbol=Y: all X> <define symbol=X: no Y>",
        "<define symbol=Z: Y> <define symbol=Y: X> <define symbol=X: Z>",
    ],
)
def test_circles_are_refused(text: str) -> None:
    read = read_symbols(f"{text} X", count)
    assert "by itself" in read.faults[0].error
    assert "X" not in read.in_force


def test_a_definition_may_use_earlier_symbols() -> None:
    read = read_symbols(f"{MEAN} <define symbol=D: twice M> So D.", count)
    assert read.expanded() == "So twice the mean of both."
    assert read.compression(count).saved_tokens == 4


def test_an_expansion_bomb_goes_out() -> None:
    names = [f"B{number}" for number in range(40)]
    bomb = "<define symbol=B0: lol lol lol>" + "".join(
        f"<define symbol={name}: {f'{before} ' * 10}>"
        for before, name in zip(names, names[1:], strict=False)
    )
    read = read_symbols(bomb + "B39 B9 B3" * 50, count, budget=10_000)
    assert max(len(symbol.meaning) for symbol in read.in_force.values()) <= LONGEST_MEANING
    assert any("expands to more" in fault.error for fault in read.faults)
    assert len(read.expanded()) < 200 * LONGEST_MEANING


@pytest.mark.parametrize(
    "unit", ["<define ", "<define symbol=X: ", "<define symbol=X:" + " " * 20, "X", "X ", "<", " "]
)
def test_long_and_hostile_texts_are_read_to_their_end(unit: str) -> None:
    """A careless pattern goes back and forth in these until somebody ends the process."""
    read = read_symbols(MEAN + " M" + unit * 20_000 + " M", count)
    assert read.expanded().endswith("the mean of both")
