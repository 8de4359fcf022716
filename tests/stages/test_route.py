"""route as a whole stage: a router that opens again, the same bytes after a stop, refusals."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modeling.loading import open_model, open_tokenizer
from modeling.pooled_states import pooled_states
from modeling.router import open_router
from registry.catalog import names
from registry.strict import strict_yaml
from runtime.prompt import prompt_tokens, request_span
from stages.digests import write_manifest
from stages.formats.conversations import Conversation, write_conversations
from stages.process import Stopped
from stages.route.queries import LEARNT, MEASURED, Query, gather
from tests.stages.skill_dag import make_skill_dag
from tests.stages.tiny_dag import StopAt, TinyDag

ASKED = {
    "arithmetic-tools": "What is {} times {}?",
    "devops": "How do I restart service {} on host {}?",
}


def told(name: str, number: int) -> Conversation:
    asked = ASKED[name].format(number, number + 3)
    return Conversation(f"{name}/{number}", name, (("prompt", asked), ("own", "so")), None)


@pytest.fixture
def dag(tmp_path: Path) -> TinyDag:
    made = make_skill_dag(tmp_path)
    prepared = tmp_path / "artifacts/prepare"
    for name in ASKED:
        write_conversations(prepared, name, "train", (told(name, n) for n in range(8)))
        write_conversations(prepared, name, "heldout", (told(name, n) for n in range(50, 54)))
    write_manifest(prepared)
    return made


def test_the_router_opens_again_and_routes_what_it_was_taught(dag: TinyDag) -> None:
    metrics = dag.run("route")
    folder = dag.root / "artifacts/distill/student"
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    router = open_router(dag.root / "artifacts/route", 32)
    assert router.shape.capabilities == ("tools", "devops")
    assert router.shape.blocks[-1] == metrics["block"]
    tokens = prompt_tokens(told("devops", 2).prompt, tokenizer)
    span = request_span(tokens, tokenizer)
    states = pooled_states(model, [tokens], [span], list(router.shape.blocks))
    probabilities = router.probabilities(states)
    assert probabilities.shape == (1, 3)
    assert probabilities[0].argmax() == 1
    known = load_file(dag.root / "artifacts/route/known.safetensors")
    assert known["train.states"].shape[1:] == (len(router.shape.blocks), 32)
    for part in ("train", "validation"):
        assert len(known[f"{part}.states"]) == len(known[f"{part}.classes"]) > 0


def test_figures_are_those_of_held_out_paraphrased_and_near_queries(dag: TinyDag) -> None:
    metrics = dag.run("route")
    for name in ("heldout.macro_f1", "paraphrased.macro_f1", "heldout.auroc", "near.abstained"):
        assert 0 <= metrics[name] <= 1
    assert metrics["load.tools"] + metrics["load.devops"] == pytest.approx(1, abs=1e-5)
    facts = json.loads((dag.root / "artifacts/route/route.json").read_text())
    assert set(facts["losses"]) == {"1", "2"} and set(facts["growth"]) == {"tools", "devops"}
    assert set(facts["growth"]["tools"]["changes"]) == {"devops"}
    assert (dag.root / "artifacts/route/route.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_while_reading_it_ends_with_the_same_bytes(dag: TinyDag, tmp_path: Path) -> None:
    dag.run("route")
    whole = dag.published("route")
    other = make_other(dag, tmp_path / "other")
    with pytest.raises(Stopped):
        other.run("route", StopAt("main", 3))
    other.run("route")
    assert other.published("route") == whole


def make_other(dag: TinyDag, root: Path) -> TinyDag:
    """The same DAG in another folder, nothing of route in it."""
    root.mkdir()
    for name in ("stages", "modeling", "registry", "runtime", "dvc.yaml", "params.yaml"):
        (root / name).symlink_to((dag.root / name).resolve())
    (root / "artifacts").mkdir()
    for name in ("prepare", "distill", "profile"):
        (root / "artifacts" / name).symlink_to(dag.root / "artifacts" / name)
    return TinyDag(root)


def plain(query: Query) -> str:
    """A query without case and punctuation."""
    return " ".join(re.findall(r"\w+", query.text.lower()))


@pytest.mark.parametrize("most", [6, 10_000])
def test_no_query_measures_that_was_learnt_from(dag: TinyDag, most: int) -> None:
    sets = gather(dag.root / "artifacts/prepare", ("tools", "devops"), most, 0.3, 0)
    learnt = {plain(query) for query in (*sets.train, *sets.validation)}
    measured = {plain(query) for query in (*sets.heldout, *sets.paraphrased, *sets.near)}
    assert learnt.isdisjoint(measured)
    assert {plain(q) for q in sets.train}.isdisjoint(plain(q) for q in sets.validation)
    assert {query.capability for query in sets.train} == {"tools", "devops", None}


def test_both_the_data_sets_and_the_written_queries_are_learnt_from(dag: TinyDag) -> None:
    sets = gather(dag.root / "artifacts/prepare", ("tools", "devops"), 6, 0.3, 0)
    tools = [query.text for query in sets.train if query.capability == "tools"]
    asked = [text for text in tools if re.fullmatch(r"What is \d+ times \d+\?", text)]
    assert len(tools) == 8 and len(asked) == 4


def test_every_capability_is_asked_for_in_other_wordings_once_each() -> None:
    capabilities = set(names("capabilities"))
    learnt, measured = strict_yaml(LEARNT), strict_yaml(MEASURED)
    for part in (learnt["asked"], learnt["near"], measured["paraphrased"], measured["near"]):
        assert set(part) == capabilities
    texts = [
        text for part in (learnt["asked"], learnt["near"]) for of in part.values() for text in of
    ] + learnt["other"]
    assert len({plain(Query(text, None)) for text in texts if text[0].isascii()}) > 0.98 * len(
        texts
    )


def texts_in(part: dict | list) -> list[str]:
    """All queries below a section of a file."""
    if isinstance(part, list):
        return part
    return [text for of in part.values() for text in texts_in(of)]


def test_what_is_learnt_says_nothing_in_the_words_of_what_is_measured() -> None:
    def sevens(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 7]) for at in range(len(words) - 6)} | {tuple(words)}

    measured = {run for text in texts_in(strict_yaml(MEASURED)) for run in sevens(text)}
    assert not [text for text in texts_in(strict_yaml(LEARNT)) if sevens(text) & measured]


def test_a_block_that_the_student_does_not_have_is_refused_before_it_reads(dag: TinyDag) -> None:
    dag.set("route", blocks=[1, 3])
    with pytest.raises(ValueError, match=r"blocks \[3\], but the student has 2"):
        dag.run("route")
