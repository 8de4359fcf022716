"""The plan: what has to run, in which order and why."""

import pytest
import yaml

import registry.catalog
from flows.plan import (
    BrokenPipelineFile,
    Node,
    UnknownStage,
    read_metrics,
    read_nodes,
    remove_strays,
    select_nodes,
)
from tests.flows.nodes import reasons, restorable
from tests.flows.project import NODES, Project, snapshot


def names(nodes: list[Node]) -> list[str]:
    return [node.name for node in nodes]


# --- the graph -------------------------------------------------------------------------------


def test_every_node_comes_behind_those_that_it_reads(fresh: Project) -> None:
    nodes = read_nodes(fresh.root)
    assert names(nodes) == list(NODES)
    upstream = {node.name: node.upstream for node in nodes}
    assert upstream["seed"] == ()
    assert upstream["leaf@mamba-130m"] == ("seed",)
    assert upstream["join"] == ("leaf@mamba-130m", "leaf@smollm2-135m")


def test_a_node_of_a_teacher_knows_its_stage_and_its_paths(fresh: Project) -> None:
    node = read_nodes(fresh.root)[2]
    assert (node.name, node.stage) == ("leaf@smollm2-135m", "leaf")
    assert (node.description, node.headline) == ("one branch a teacher", "value")
    assert node.out == "artifacts/leaf/smollm2-135m"
    assert node.metrics == "metrics/leaf/smollm2-135m.json"


def test_a_finished_project_has_nothing_stale_and_its_metrics(finished: Project) -> None:
    assert reasons(finished) == {}
    node = read_nodes(finished.root)[-1]
    assert read_metrics(finished.root, node)["value"] == finished.value("join") == 12


def test_a_plan_does_not_depend_on_the_working_folder(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = read_nodes(finished.root)
    monkeypatch.chdir("/")
    assert read_nodes(finished.root) == here


def test_a_node_that_never_finished_has_no_metrics(fresh: Project) -> None:
    assert read_metrics(fresh.root, read_nodes(fresh.root)[0]) == {}


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("dvc.yaml", "stages: [unclosed", "dvc.yaml"),
        ("dvc.yaml", "stages:\n  seed:\n    nonsense: 3\n", "dvc.yaml"),
        ("dvc.lock", "schema: '2.0'\nstages: {seed: {}}\n", "dvc.lock"),
        ("params.yaml", "teachers: [unclosed", "params.yaml"),
        ("params.yaml", "preset: small\n", "'teachers'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_saying_what_is_wrong(
    fresh: Project, name: str, text: str, named: str
) -> None:
    (fresh.root / name).write_text(text)
    with pytest.raises(BrokenPipelineFile, match=named):
        read_nodes(fresh.root)


# --- reasons ---------------------------------------------------------------------------------


def test_what_never_ran_says_so(fresh: Project) -> None:
    assert reasons(fresh) == {name: ("never ran",) for name in NODES}


def test_a_changed_parameter_is_told_with_both_values(finished: Project) -> None:
    finished.set(leaf={"value": 7})
    expected = ("leaf.value 2 -> 7",)
    assert reasons(finished) == {"leaf@mamba-130m": expected, "leaf@smollm2-135m": expected}


def test_a_new_and_a_dropped_parameter_are_told(finished: Project) -> None:
    text = finished.params().replace("steps: 5", "rate: 5", 1)
    assert reasons(finished, text) == {"seed": ("seed.steps 5 -> gone", "seed.rate new -> 5")}


def test_a_changed_fact_of_one_teacher_concerns_that_teacher_alone(finished: Project) -> None:
    path = finished.root / "registry" / "teachers.yaml"
    facts = yaml.safe_load(path.read_text())
    facts["mamba-130m"]["licence"] = "MIT"
    path.write_text(yaml.safe_dump(facts))
    (stale,) = reasons(finished).items()
    assert stale[0] == "leaf@mamba-130m"
    assert stale[1] == ("registry/teachers.yaml: mamba-130m.licence Apache-2.0 -> MIT",)


def test_every_teacher_of_the_registry_can_be_planned(finished: Project) -> None:
    """DVC takes a dot in the name of a parameter for a path."""
    finished.set(teachers=registry.catalog.names("teachers"))
    new = [name for name, why in reasons(finished).items() if why == ("never ran",)]
    assert len(new) == len(registry.catalog.names("teachers")) - 2


def test_changed_code_is_told_for_those_that_declare_it(finished: Project) -> None:
    with (finished.root / "stages" / "leaf" / "stage.py").open("a") as file:
        file.write("# changed\n")
    expected = ("code changed: stages/leaf",)
    assert reasons(finished) == {"leaf@mamba-130m": expected, "leaf@smollm2-135m": expected}


def test_missing_code_is_told_as_missing(finished: Project) -> None:
    (finished.root / "stages" / "toy.py").unlink()
    assert reasons(finished)["seed"] == ("code changed: stages/toy.py (missing)",)


def test_a_changed_command_is_told(finished: Project) -> None:
    path = finished.root / "dvc.yaml"
    path.write_text(path.read_text().replace("python -m stages join", "python -m stages  join"))
    assert reasons(finished) == {"join": ("its command changed",)}


def test_a_changed_output_is_told_there_and_as_input_behind_it(finished: Project) -> None:
    path = finished.root / "artifacts" / "seed" / "value.txt"
    path.unlink()  # it is a link into DVC's cache
    path.write_text("99")
    found = reasons(finished)
    assert found["seed"] == ("output changed: artifacts/seed",)
    assert found["leaf@mamba-130m"] == ("input changed: artifacts/seed",)
    assert "join" not in found


def test_missing_outputs_and_metrics_are_told(finished: Project) -> None:
    (finished.root / "artifacts" / "join").rename(finished.root / "elsewhere")
    (finished.root / "metrics" / "seed.json").unlink()
    assert reasons(finished) == {
        "join": ("output missing: artifacts/join",),
        "seed": ("output missing: metrics/seed.json",),
    }


# --- plans that touch nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"leaf": {"value": 7}},
        {"teachers": ["mamba-130m"]},
        {"teachers": ["smollm2-135m", "mamba-130m", "qwen3-8b"]},
    ],
)
def test_a_plan_for_other_params_is_right_and_writes_nothing(
    finished: Project, change: dict
) -> None:
    text = finished.params(**change)
    before = snapshot(finished.root)
    planned = read_nodes(finished.root, text)
    assert snapshot(finished.root) == before
    finished.set(**change)
    assert planned == read_nodes(finished.root)
    assert planned != read_nodes(finished.root, finished.params(seed={"value": 3}))


def test_a_plan_for_fewer_teachers_has_no_node_for_the_others(finished: Project) -> None:
    nodes = read_nodes(finished.root, finished.params(teachers=["mamba-130m"]))
    assert names(nodes) == ["seed", "leaf@mamba-130m", "join"]
    assert nodes[-1].upstream == ("leaf@mamba-130m",)


def test_a_run_leaves_the_outputs_of_a_teacher_that_is_not_asked_for_out_of_its_inputs(
    finished: Project,
) -> None:
    finished.set(teachers=["mamba-130m"])
    remove_strays(finished.root, read_nodes(finished.root))
    assert reasons(finished) == {"join": ("input changed: artifacts/leaf",)}
    finished.dvc("repro")
    assert finished.value("join") == 6


# --- the run cache ---------------------------------------------------------------------------


def test_going_back_to_earlier_values_is_planned_as_restorable(finished: Project) -> None:
    finished.set(seed={"value": 2})
    assert restorable(finished) == {"seed": False}
    finished.dvc("repro")
    assert restorable(finished) == {}
    finished.set(seed={"value": 1})
    assert restorable(finished) == {"seed": True}
    count = len(finished.marks())
    finished.dvc("repro")
    assert len(finished.marks()) == count, "a stage ran although the run cache had its result"
    assert finished.value("join") == 12


def test_a_result_whose_content_was_dropped_from_the_cache_is_not_restorable(
    finished: Project,
) -> None:
    (finished.root / "artifacts" / "seed").rename(finished.root / "elsewhere")
    (finished.root / ".dvc" / "cache" / "files").rename(finished.root / ".dvc" / "cache" / "lost")
    assert restorable(finished)["seed"] is False


# --- the choice ------------------------------------------------------------------------------


@pytest.fixture
def nodes(finished: Project) -> list[Node]:
    """The nodes of a finished project."""
    return read_nodes(finished.root)


@pytest.mark.parametrize(
    ("only", "start", "expected"),
    [
        (None, None, list(NODES)),
        ("seed", None, ["seed"]),
        ("leaf", None, ["leaf@mamba-130m", "leaf@smollm2-135m"]),
        ("leaf@mamba-130m", None, ["leaf@mamba-130m"]),
        (None, "seed", list(NODES)),
        (None, "leaf@mamba-130m", ["leaf@mamba-130m", "join"]),
        (None, "join", ["join"]),
    ],
)
def test_the_choice_is_one_stage_or_a_stage_and_all_behind_it(
    nodes: list[Node], only: str | None, start: str | None, expected: list[str]
) -> None:
    assert names(select_nodes(nodes, only, start)) == expected


@pytest.mark.parametrize("how", [("jion", None), (None, "jion"), ("leaf@gpt", None), ("", None)])
def test_an_unknown_stage_is_refused_with_those_that_there_are(
    nodes: list[Node], how: tuple
) -> None:
    with pytest.raises(UnknownStage, match="the stages are seed, leaf, join$"):
        select_nodes(nodes, *how)


def test_a_missing_input_names_the_stage_to_run_first(finished: Project, nodes: list[Node]) -> None:
    (finished.root / "artifacts" / "leaf" / "mamba-130m").rename(finished.root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="artifacts/leaf/mamba-130m.*--stage leaf"):
        select_nodes(nodes, "join", None)
    assert names(select_nodes(nodes, None, "leaf")) == list(NODES[1:])
