"""Scores follow from sums: whatever the batches, the order of blocks and the padding."""

import pytest
import torch
from torch import Tensor

from modeling.block_readings import Reading, read_blocks
from modeling.block_scores import GLOBAL, LAYER, SCALES, BlockStatistics, over_kinds, robust_z, sps
from modeling.block_sites import Site, find_sites
from tests.modeling.test_block_readings import TOKENS
from tests.tiny import tiny_llama

SITES = [Site("a", 0, "head", 4, 4), Site("b", 0, "neurons", 8, 6), Site("c", 1, "head", 4, 4)]
both_scales = pytest.mark.parametrize("scale", SCALES)


def made_up(rows: int, seed: int = 0) -> list[Reading]:
    generator = torch.Generator().manual_seed(seed)

    def values(site: Site) -> Tensor:
        return torch.randn(rows, 5, site.count, generator=generator)

    return [Reading(values(s).abs(), values(s).abs() * 1e-6, values(s)) for s in SITES]


def statistics(readings: list[Reading], *parts: slice, real: Tensor | None = None):
    found = BlockStatistics(SITES)
    real = torch.ones(readings[0].taylor.shape[:2], dtype=torch.bool) if real is None else real
    for part in parts or (slice(None),):
        cut = [Reading(r.activation[part], r.gradient[part], r.taylor[part]) for r in readings]
        found.add(cut, real[part])
    return found


def test_robust_z_is_not_moved_by_an_outlier() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    assert robust_z(values)[:4].tolist() == pytest.approx([-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826])
    assert robust_z(torch.ones(4)).tolist() == [0.0] * 4


def test_a_layer_has_a_scale_of_its_own_and_a_kind_one_for_all() -> None:
    values = [reading.activation for reading in made_up(2)]
    values[2] = 1000 * values[2]
    alone, together = (over_kinds(values, SITES, scale) for scale in (LAYER, GLOBAL))
    torch.testing.assert_close(alone[2], robust_z(values[2]))
    torch.testing.assert_close(together[1], alone[1])  # the only site of its kind
    heads = robust_z(torch.cat([values[0], values[2]], -1))
    torch.testing.assert_close(torch.cat([together[0], together[2]], -1), heads)


@both_scales
def test_scores_do_not_depend_on_how_tokens_come_in_batches(scale: str) -> None:
    readings = made_up(6)
    whole = statistics(readings)
    split = statistics(readings, slice(0, 1), slice(1, 4), slice(4, 6))
    assert whole.tokens == split.tokens == 30
    for name in whole.sums:
        for a, b in zip(whole.mean(name), split.mean(name), strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(whole.integrated_sps(scale), split.integrated_sps(scale), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_does_not_count() -> None:
    readings, real = made_up(3), torch.ones(3, 5, dtype=torch.bool)
    real[2, 2:] = False
    cut = [Reading(r.activation.clone(), r.gradient.clone(), r.taylor.clone()) for r in readings]
    for one in cut:
        one.activation[2, 2:] = one.gradient[2, 2:] = one.taylor[2, 2:] = 1e9
    expected, found = statistics(readings, real=real), statistics(cut, real=real)
    assert found.tokens == 12
    for name in expected.sums:
        for a, b in zip(expected.mean(name), found.mean(name), strict=True):
            torch.testing.assert_close(a, b)


@both_scales
def test_the_order_of_blocks_does_not_matter(scale: str) -> None:
    readings, order = made_up(4), torch.tensor([3, 1, 0, 2])
    moved = list(readings)
    moved[0] = Reading(*(v[..., order] for v in vars(readings[0]).values()))
    before, after = (statistics(r).integrated_sps(scale) for r in (readings, moved))
    torch.testing.assert_close(after[0], before[0][order])
    torch.testing.assert_close(after[1], before[1])


def test_means_are_those_of_the_formulas() -> None:
    readings = made_up(2)
    found, taylor = statistics(readings), readings[1].taylor.double().flatten(0, 1)
    torch.testing.assert_close(found.mean("taylor")[1], taylor.abs().mean(0))
    expected = (-taylor + taylor.square() / 2).mean(0)
    torch.testing.assert_close(found.mean("second order")[1], expected, atol=1e-6, rtol=1e-5)
    told = [reading.of(torch.ones(2, 5, dtype=torch.bool)) for reading in readings]
    means = [values.double().mean(0) for values in sps(told, SITES, LAYER)]
    torch.testing.assert_close(found.mean("sps layer"), means)


def test_every_block_of_a_real_model_has_a_score() -> None:
    model = tiny_llama()
    sites = find_sites(model, neurons=8)
    found = BlockStatistics(sites)
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    found.add(read_blocks(model, TOKENS, sites)[1], real)
    for name in ("activation", "gradient", "taylor"):
        assert all((mean > 0).all() for mean in found.mean(name)), name
