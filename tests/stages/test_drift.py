"""Drift: 0 for the same states, 1 for those of other tokens, and measured where they correspond."""

import copy

import pytest
import torch

from modeling.blocks import block_outputs, dissect, drop_blocks
from stages.measuring.drift import Site, counterparts, subspace_drift
from tests.stages.lessons import block_outputs as hooked_outputs
from tests.stages.lessons import rows, subspaces_of
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

TOKENS = rows(12)


def everywhere(model) -> list[Site]:
    return [Site(block, block, block) for block in range(len(dissect(model).blocks))]


def scrambled(model, strength: float, first: int):
    """A copy whose blocks from `first` on do something else."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in dissect(other).blocks[first:]:
        for weight in block.parameters():
            noise = torch.randn(weight.shape, generator=generator) * weight.detach().std()
            weight.data += strength * noise.nan_to_num()
    return other


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_outputs_are_those_of_the_models_own_forward(build) -> None:
    model = build()
    for own, hooked in zip(
        block_outputs(model, TOKENS), hooked_outputs(model, TOKENS), strict=True
    ):
        assert torch.equal(own, hooked)


def test_a_model_has_not_moved_from_itself() -> None:
    model = tiny_llama()
    drift = subspace_drift(model, model, everywhere(model), subspaces_of(model, TOKENS), TOKENS, 4)
    assert drift == [0.0] * 3


def test_states_of_other_tokens_are_at_one() -> None:
    """The expectation over two independent draws, which shuffled tokens come near to."""
    model = tiny_llama(vocab=512)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (64, 16), generator=generator)
    subspaces = subspaces_of(model, tokens)
    other = copy.deepcopy(model)
    embedding = other.get_input_embeddings().weight.data
    embedding.copy_(embedding[torch.randperm(512, generator=generator)])
    drift = subspace_drift(model, other, everywhere(model), subspaces, tokens, 8)
    assert drift == pytest.approx([1.0] * 3, abs=0.1)


def test_drift_begins_where_the_change_does_and_grows_with_it() -> None:
    model = tiny_llama()
    subspaces = subspaces_of(model, TOKENS)
    little, much = (
        subspace_drift(model, scrambled(model, by, 1), everywhere(model), subspaces, TOKENS, 4)
        for by in (0.1, 0.5)
    )
    assert little[0] == much[0] == 0.0
    assert all(0 < a < b for a, b in zip(little[1:], much[1:], strict=True))


def test_the_size_of_a_batch_changes_nothing() -> None:
    model = tiny_llama()
    subspaces, other = subspaces_of(model, TOKENS), scrambled(model, 0.2, 0)
    one, five = (
        subspace_drift(model, other, everywhere(model), subspaces, TOKENS, n) for n in (1, 5)
    )
    assert one == pytest.approx(five, rel=1e-5)


def test_a_pruned_model_is_compared_where_it_has_the_teachers_blocks() -> None:
    teacher = tiny_llama(blocks=6)
    student = copy.deepcopy(teacher)
    drop_blocks(student, [3])
    places = counterparts(range(6), [3])
    assert places == {0: 0, 1: 1, 3: 2, 4: 3, 5: 4}  # 2 is the bridge: it stands for 3 now
    sites = [Site(block, block, place) for block, place in places.items()]
    drift = subspace_drift(teacher, student, sites, subspaces_of(teacher, TOKENS), TOKENS, 4)
    assert drift[:2] == [0.0, 0.0] and min(drift[2:]) > 0
