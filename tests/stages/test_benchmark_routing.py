"""Routing in the benchmark: scores are those of merged models, differences are what they are."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from modeling.loading import open_model
from modeling.lora import AdapterShape, adapt, open_merged, save_adapter
from modeling.router import Router, RouterShape, save_router
from runtime.adapters.bank import AdapterBank
from stages.benchmark.capabilities import describe
from stages.benchmark.replies import RoutedStudent, reply_scores
from stages.benchmark.routing import (
    ALONE,
    ARROW,
    MERGED,
    ORACLE,
    ROUTED,
    RoutedQuery,
    RoutingScores,
    assess_routing,
    flatten_routing,
    heldout_queries,
    routing_table,
    routing_verdicts,
)
from stages.formats.conversations import write_conversations
from stages.learning.supervision import Example, encode
from stages.measuring.statistics import sign_flip_p
from tests.stages.skill_dag import HELD_OUT, letters, make_skill_dag
from tests.stages.tiny_dag import TinyDag

NAMES = ("tools", "devops")


@pytest.fixture
def dag(tmp_path: Path) -> TinyDag:
    """A student that knows its replies by heart, adapters that disturb it, a fixed router."""
    made = make_skill_dag(tmp_path)
    for seed, name in enumerate(NAMES):
        write_disturbance(made.root, name, seed)
    write_router(made.root / "artifacts/route", chosen="devops")
    return made


def student_of(dag: TinyDag) -> Path:
    return dag.root / "artifacts/distill/student"


def write_disturbance(root: Path, name: str, seed: int, rank: int = 2) -> None:
    """An adapter of noise that is loud enough to change what is said."""
    model = open_model(root / "artifacts/distill/student")
    start = root / "start" / name
    adapted = adapt(model, AdapterShape(rank, 2.0 * rank, "lora"), seed, start)
    torch.manual_seed(seed)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(adapted, root / "artifacts/sft" / name, start)


def write_router(folder: Path, chosen: str | None) -> None:
    """A router that chooses one capability whatever it reads; None: it abstains."""
    router = Router(RouterShape(NAMES, (1,), 32, 4))
    with torch.no_grad():
        router.outer.weight.zero_()
        router.outer.bias.copy_(torch.tensor([float(n == chosen) * 5 for n in (*NAMES, None)]))
    save_router(router, folder)


def opened(dag: TinyDag) -> RoutedStudent:
    artifacts = dag.root / "artifacts"
    return RoutedStudent(student_of(dag), artifacts / "route", artifacts / "sft")


@torch.no_grad()
def naive(model, example: Example) -> float:
    """One token at a time, each from a pass of its own over those before it."""
    places = [at for at, counts in enumerate(example.counted) if counts]
    tokens = torch.tensor([example.tokens])
    said = [model(tokens[:, :at]).logits[0, -1].argmax().item() for at in places]
    return sum(s == example.tokens[at] for s, at in zip(said, places, strict=True)) / len(places)


# --- scores ----------------------------------------------------------------------------------


def test_a_query_gets_the_scores_of_merged_models(dag: TinyDag) -> None:
    model = open_model(student_of(dag))
    for told in HELD_OUT:
        query = opened(dag).score("tools", told)
        example = encode(told, letters())
        assert query.alone == pytest.approx(naive(model, example))
        for name in NAMES:
            merged = open_merged(copy.deepcopy(model), dag.root / "artifacts/sft" / name)
            assert query.adapters[name] == pytest.approx(naive(merged, example))
        assert query.alone > 0.9 > min(query.adapters.values())
        assert query.arrow is not None and 0 <= query.arrow <= 1
        assert (query.request, query.chosen) == (told.prompt, "devops")


def test_a_mix_of_one_adapter_twice_by_halves_is_that_adapter(dag: TinyDag) -> None:
    model = open_model(student_of(dag))
    bank = AdapterBank(model, 1 << 30)
    bank.add("one", dag.root / "artifacts/sft/tools")
    bank.add("same", dag.root / "artifacts/sft/tools")
    held = bank.take(["one", "same"])
    half = tuple((adapter, 0.5) for adapter in held.values())
    for told in HELD_OUT:
        whole, mixed = reply_scores(model, encode(told, letters()), [((held["one"], 1.0),), half])
        assert whole == mixed


def test_an_abstaining_router_leaves_the_student_as_it_is(dag: TinyDag) -> None:
    write_router(dag.root / "artifacts/route", chosen=None)
    query = opened(dag).score("tools", HELD_OUT[0])
    assert query.chosen is None
    assert assess_routing([query], 100, 0).ways[ROUTED].score.value == query.alone


def test_what_cannot_be_opened_is_named_and_the_rest_measured(dag: TinyDag) -> None:
    shutil.rmtree(dag.root / "artifacts/sft/devops")
    student = opened(dag)
    assert list(student.adapters) == ["tools"]
    assert student.without["adapter 'devops'"] == "sft does not teach it"
    query = student.score("tools", HELD_OUT[0])
    assert list(query.adapters) == ["tools"] and query.chosen == "devops"
    assert assess_routing([query], 100, 0).ways[ROUTED].score.value == query.alone


def test_without_any_adapter_every_way_is_the_student_as_it_is(dag: TinyDag) -> None:
    shutil.rmtree(dag.root / "artifacts/sft/devops")
    (dag.root / "artifacts/sft/tools/experts.json").write_text("{}")
    assert "holds experts" in opened(dag).without["adapter 'tools'"]
    query = opened(dag).score("tools", HELD_OUT[0])
    assert query.adapters == {} and query.arrow is None
    found = assess_routing([query], 100, 0).ways
    assert {way.score.value for way in found.values()} == {query.alone}


def test_a_damaged_adapter_is_no_missing_one(dag: TinyDag) -> None:
    (dag.root / "artifacts/sft/devops/adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        opened(dag)


def test_adapters_of_unlike_ranks_are_not_compared_with_arrow(dag: TinyDag) -> None:
    write_disturbance(dag.root, "devops", 1, rank=4)
    student = opened(dag)
    assert student.without.keys() == {"Arrow"}
    query = student.score("tools", HELD_OUT[0])
    assert query.arrow is None and len(query.adapters) == 2
    assert ARROW not in assess_routing([query], 100, 0).ways


def test_scores_come_back_from_a_checkpoint(dag: TinyDag, tmp_path: Path) -> None:
    scores, fresh = RoutingScores([opened(dag).score("tools", HELD_OUT[0])]), RoutingScores()
    scores.save(tmp_path)
    fresh.load(tmp_path)
    assert fresh == scores


def test_queries_are_the_held_out_ones_as_many_as_asked(tmp_path: Path) -> None:
    write_conversations(tmp_path, "arithmetic-tools", "heldout", HELD_OUT)
    write_conversations(tmp_path, "devops", "heldout", HELD_OUT[:1])
    found = heldout_queries(tmp_path, NAMES, 3)
    assert [name for name, _ in found] == ["tools"] * 3 + ["devops"]
    assert found == heldout_queries(tmp_path, NAMES, 3)
    assert {told.id for _, told in found} <= {told.id for told in HELD_OUT}


# --- what is made of them --------------------------------------------------------------------


def query(capability: str, chosen: str | None, scores: Sequence[float]) -> RoutedQuery:
    """scores: alone, merged, arrow, tools, devops."""
    alone, merged, arrow, tools, devops = scores
    both = {"tools": tools, "devops": devops}
    return RoutedQuery(capability, "?", chosen, alone, merged, both, arrow)


QUERIES = [
    *[query("tools", "tools", (0.2, 0.5, 0.9, 0.8, 0.1))] * 12,
    *[query("devops", "tools", (0.2, 0.3, 0.6, 0.4, 0.6))] * 4,
    *[query("devops", None, (0.2, 0.3, 0.4, 0.1, 0.6))] * 4,
]


def test_every_way_chooses_as_it_says() -> None:
    found = assess_routing(QUERIES, 200, 0)
    expected = {
        ROUTED: (12 * 0.8 + 4 * 0.4 + 4 * 0.2) / 20,
        ORACLE: (12 * 0.8 + 8 * 0.6) / 20,
        ALONE: 0.2,
        MERGED: (12 * 0.5 + 8 * 0.3) / 20,
        ARROW: (12 * 0.9 + 4 * 0.6 + 4 * 0.4) / 20,
        "only tools": (12 * 0.8 + 4 * 0.4 + 4 * 0.1) / 20,
        "only devops": (12 * 0.1 + 8 * 0.6) / 20,
    }
    assert {n: way.score.value for n, way in found.ways.items()} == pytest.approx(expected)
    gains = {n: way.routed_gains.value for n, way in found.ways.items()}
    assert gains == pytest.approx({n: expected[ROUTED] - value for n, value in expected.items()})
    assert found.capabilities["devops"][ORACLE] == pytest.approx(0.6)
    assert found.capabilities["tools"][ROUTED] == pytest.approx(0.8)


def test_what_routing_does_not_beat_is_named() -> None:
    found = assess_routing(QUERIES, 200, 0)
    first, *rest = routing_verdicts(found)
    assert "60.0%" in first
    words = {s.split(" (diff")[0].removeprefix("That is "): s for s in rest}
    assert "better than the student as it is" in words
    assert "WORSE than PEFT's Arrow: three adapters a token and layer" in str(list(words))
    assert "+30.0 points" in words["better than adapter devops for every query"]


def test_what_was_not_compared_is_named_with_its_reason() -> None:
    found = assess_routing(QUERIES, 200, 0, {"Arrow": "ranks differ"})
    assert routing_verdicts(found)[-1] == "Not compared: Arrow (ranks differ)."


def test_the_table_has_a_line_a_way_and_no_gain_of_routing_over_itself() -> None:
    heads, _, routed, *others = routing_table(assess_routing(QUERIES, 200, 0).ways)
    assert heads.count("|") == routed.count("|") and routed.endswith("|  |  |")
    assert len(others) == 6 and all("[" in line for line in others)


def test_metrics_have_a_flat_name_each() -> None:
    flat = flatten_routing(assess_routing(QUERIES, 200, 0))
    assert flat["routing.routed"] == 0.6 and flat["routing.no_adapter"] == 0.2
    assert flat["routing.gain_over.only_devops"] == pytest.approx(0.3)
    assert flat["routing.gain_over.arrow_high"] < 0
    assert "routing.gain_over.routed" not in flat


def test_the_manifest_says_what_each_capability_is_costs_and_is_worth(dag: TinyDag) -> None:
    tools, devops = describe(NAMES, opened(dag).adapters, QUERIES[:12], "some-teacher")
    assert tools["name"] == "tools" and tools["tier"] == "pro" and tools["rank"] == 2
    assert tools["bytes"] == 4 * parameters_of(dag) and tools["teacher"] == "some-teacher"
    assert (tools["queries"], tools["score"], tools["score_alone"]) == (12, 0.8, 0.2)
    assert (devops["queries"], devops["score"]) == (0, None)
    (alone,) = describe(("tools",), {}, QUERIES, "some-teacher")
    assert alone["rank"] is None and alone["score"] == 0.8
    assert json.loads(json.dumps([tools])) == [tools]


def parameters_of(dag: TinyDag) -> int:
    facts = AdapterBank(open_model(student_of(dag)), 1 << 30)
    facts.add("tools", dag.root / "artifacts/sft/tools")
    return facts.listing()[0].bytes // 4


# --- the test of paired differences ----------------------------------------------------------


def test_flipped_signs_tell_a_difference_from_chance() -> None:
    assert sign_flip_p([0.1] * 20, 0) < 0.001
    assert sign_flip_p([0.0] * 20, 0) == 1.0
    assert sign_flip_p([1.0, -1.0] * 10, 0) == 1.0
    assert sign_flip_p([-0.1] * 20, 0) == sign_flip_p([0.1] * 20, 0)
    assert sign_flip_p([1.0, 1.0, 1.0], 0) == pytest.approx(2 / 8, abs=0.02)
