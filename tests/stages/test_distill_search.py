"""Which blocks are dropped: the least harmful, measured again as others go."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.losses import TeacherView
from stages.distill.search import Scene, Search, search_blocks
from stages.distill.student import build_student
from tests.stages.lessons import rows, teacher


def ranked(harms: list[float], count: int, prefix: int) -> list[int]:
    """What is dropped when nothing is measured again."""
    search = Search(harms, count, prefix)
    assert len(list(search_blocks(None, [], search, width=0))) == count
    return sorted(search.dropped)


@pytest.mark.parametrize("prefix", [0, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_prefix_and_the_block_behind_it_stay_however_little_they_do(
    prefix: int, count: int
) -> None:
    dropped = ranked([0.0] * (prefix + 1) + [5.0] * (8 - prefix - 1), count, prefix)
    assert len(dropped) == count and min(dropped) > prefix


def test_without_measuring_again_blocks_go_in_the_order_of_their_harm() -> None:
    harms = [0.1, 0.2, 0.9, 0.7, 0.3, 0.8, 0.6]
    assert [ranked(harms, count, 1) for count in (1, 2, 3)] == [[4], [4, 6], [3, 4, 6]]
    assert ranked([0.5] * 8, 3, 1) == [2, 3, 4]  # of equal ones the first


@pytest.mark.parametrize("prefix", [0, 3, 6, 7])
def test_all_that_may_go_can_go_and_one_more_is_refused(prefix: int) -> None:
    most = 8 - prefix - 1
    assert len(ranked([0.5] * 8, most, prefix)) == most
    with pytest.raises(ValueError, match=f"only {most} of 8.*prefix of {prefix}.*lower extract"):
        Search([0.5] * 8, most + 1, prefix)


# --- measured again --------------------------------------------------------------------------


def harm_without(model, tokens: Tensor, dropped: set[int]) -> float:
    """By a smaller model's own forward."""
    with torch.no_grad():
        smaller = build_student(model, sorted(dropped))
        view = TeacherView.of(model(tokens).logits.flatten(0, 1))
        return view.kl(smaller(tokens).logits.flatten(0, 1)).mean().item()


def test_a_harm_is_that_of_the_model_without_all_of_these_blocks() -> None:
    model, tokens = teacher(6).float(), rows(3)
    with torch.no_grad():
        scene = Scene(model, tokens)
        for gone in (set(), {2}, {1, 4}):
            candidates = [block for block in (5, 3, 2) if block not in gone]
            expected = [harm_without(model, tokens, gone | {block}) for block in candidates]
            assert scene.harms(gone, candidates).tolist() == pytest.approx(expected, rel=1e-4)


def test_each_drop_is_the_least_harmful_of_all_that_are_left() -> None:
    model, tokens = teacher(7).float(), rows(4)
    alone = [harm_without(model, tokens, {block}) for block in range(7)]
    search = Search(alone, 3, prefix=1)
    for step, _ in enumerate(search_blocks(model, list(tokens.split(2)), search, width=9), 1):
        before, last = set(search.dropped[:-1]), search.dropped[-1]
        others = {b: harm_without(model, tokens, before | {b}) for b in range(2, 7)}
        others = {block: harm for block, harm in others.items() if block not in before}
        assert len(search.dropped) == step
        assert others[last] == pytest.approx(min(others.values()), rel=1e-4)
        assert search.harms[-1] == pytest.approx(others[last], rel=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_only_a_block_that_was_just_measured_goes(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured when more blocks were there looks harmless beside what is measured now."""
    model, tokens = teacher(8).float(), rows(4)
    alone = [harm_without(model, tokens, {block}) for block in range(8)]
    asked: list[tuple[set[int], list[int]]] = []
    measure = Scene.harms

    def watched(scene: Scene, gone: set[int], candidates: list[int]) -> Tensor:
        asked.append((set(gone), list(candidates)))
        return measure(scene, gone, candidates)

    monkeypatch.setattr(Scene, "harms", watched)
    search = Search(alone, 4, prefix=1)
    list(search_blocks(model, [tokens], search, width))
    for step, (gone, candidates) in enumerate(asked):
        assert gone == set(search.dropped[:step]) and len(candidates) == width
        best = min(candidates, key=lambda block: harm_without(model, tokens, gone | {block}))
        assert search.dropped[step] == best
    whole = harm_without(model, tokens, set(search.dropped))
    assert search.harm == search.harms[-1] == pytest.approx(whole, rel=1e-4)


def test_candidates_are_those_that_added_least_when_last_measured() -> None:
    search = Search([9.0, 9.0, 0.5, 0.4, 0.3, 0.2], 3, prefix=1)
    search.drop(5)
    search.known[4] = 0.6  # measured again, beside the drop of 5
    assert search.candidates(2) == [3, 2]


def test_blocks_that_stand_in_for_each_other_do_not_both_go() -> None:
    """Blocks 2 and 3 are the same and half of a whole: each is dispensable, both are not."""
    model, tokens = teacher(6).float(), rows(4)
    with torch.no_grad():
        for block in (2, 3):
            for name, other in model.model.layers[block].named_parameters():
                other.copy_(dict(model.model.layers[2].named_parameters())[name])
        for block in (2, 3, 4, 5):
            scale = 0.9 if block < 4 else 1.0
            model.model.layers[block].self_attn.o_proj.weight *= scale
    alone = [harm_without(model, tokens, {block}) for block in range(6)]
    pairs = {pair: harm_without(model, tokens, set(pair)) for pair in combinations(range(2, 6), 2)}
    search = Search(alone, 2, prefix=1)
    list(search_blocks(model, [tokens], search, width=9))
    assert pairs[tuple(sorted(search.dropped))] <= pairs[tuple(ranked(alone, 2, 1))] + 1e-6


def test_a_search_goes_on_from_where_it_was(tmp_path: Path) -> None:
    model, tokens = teacher(7).float(), rows(2)
    alone = [harm_without(model, tokens, {block}) for block in range(7)]
    whole, halted, resumed = (Search(alone, 3, prefix=1) for _ in range(3))
    list(search_blocks(model, [tokens], whole, width=4))
    next(search_blocks(model, [tokens], halted, width=4))
    halted.save(tmp_path)
    resumed.load(tmp_path)
    list(search_blocks(model, [tokens], resumed, width=4))
    assert (resumed.dropped, resumed.harms) == (whole.dropped, whole.harms)
