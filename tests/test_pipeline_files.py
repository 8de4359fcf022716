"""One name everywhere: dvc.yaml, params.yaml, presets, folders, tests and words agree.

A message says what is missing or what the right list is, so that adding a stage is filling gaps.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.catalog import KINDS
from stages.__main__ import find_stage
from tests.imports import file_of, imports_in, parse
from tests.tiny import REPOSITORY

# What carries a stage out. It moves results and does not make them, so no stage depends on it.
CARRIERS = {
    REPOSITORY / "stages" / f"{name}.py"
    for name in (
        "contract", "checkpoint", "digests", "declaration", "params", "process", "progress",
        "__main__",
    )
}  # fmt: skip
NO_STAGE = ("preset", "teachers", "pipeline")  # sections of params.yaml that belong to no stage
LOOKS = ("lookup", "select", "names")  # of registry/catalog.py; the first argument is the kind
MOST_KNOBS = 200  # some 17 a stage


def text(name: str | Path) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


DVC = yaml.safe_load(text("dvc.yaml"))["stages"]
ENTRIES = {name: entry.get("do", entry) for name, entry in DVC.items()}
ONCE_A_TEACHER = [name for name, entry in DVC.items() if "foreach" in entry]
PRESETS = sorted((REPOSITORY / "presets").glob("*.yaml"))
PARAMS_FILES = [REPOSITORY / "params.yaml", *PRESETS]

every_stage = pytest.mark.parametrize("stage", ENTRIES)
every_params_file = pytest.mark.parametrize("path", PARAMS_FILES, ids=lambda path: path.name)


# --- one name everywhere ---------------------------------------------------------------------


@every_stage
def test_a_stage_of_dvc_yaml_has_all_that_a_stage_needs(stage: str) -> None:
    module, test = f"stages/{stage}/stage.py", f"tests/stages/test_{stage}.py"
    missing = [name for name in (module, test) if not (REPOSITORY / name).is_file()]
    for path in PARAMS_FILES:
        if stage not in yaml.safe_load(text(path)):
            missing.append(f"a section '{stage}' in {path.relative_to(REPOSITORY)}")
    assert not missing, f"stage '{stage}' of dvc.yaml needs {', '.join(missing)}"
    assert find_stage(stage).name == stage, f"STAGE.name in {module} must be '{stage}'"


@every_stage
def test_outputs_and_parameters_bear_the_stages_name(stage: str) -> None:
    entry = ENTRIES[stage]
    item = "/${item}" if stage in ONCE_A_TEACHER else ""
    assert entry["outs"] == [f"artifacts/{stage}{item}"]
    assert entry["metrics"] == [{f"metrics/{stage}{item}.json": {"cache": False}}]
    own = [name for name in entry["params"] if isinstance(name, str)]
    assert own == [stage], f"of params.yaml, '{stage}' depends on its own section and on no other"
    assert entry["desc"] and entry["meta"]["headline"]


@every_stage
def test_a_command_is_one_simple_command(stage: str) -> None:
    """No shell, pipe or second command: a signal has to reach the stage itself."""
    item = " ${item}" if stage in ONCE_A_TEACHER else ""
    assert ENTRIES[stage]["cmd"] == f"python -m stages {stage}{item}"


def test_every_folder_of_a_stage_is_in_dvc_yaml() -> None:
    packages = {path.parent.name for path in (REPOSITORY / "stages").glob("*/__init__.py")}
    strays = packages - set(ENTRIES) - {"formats", "learning", "measuring"}
    assert not strays, f"no entry in dvc.yaml for stages/{', stages/'.join(sorted(strays))}"


@every_params_file
def test_every_section_belongs_to_a_stage(path: Path) -> None:
    params = yaml.safe_load(text(path))
    assert list(params) == [*NO_STAGE, *ENTRIES], "in the order of dvc.yaml"
    assert list(params["pipeline"]["expected"]) == list(ENTRIES)


def test_the_readme_has_a_table_of_the_stages() -> None:
    assert (REPOSITORY / "README.md").is_file(), "README.md is missing"
    tables, table = [], []
    for line in [*text("README.md").splitlines(), ""]:
        if line.lstrip().startswith("|"):
            table.append(line.split("|")[1].strip(" `*"))
        elif table:
            tables.append(table)
            table = []
    fullest = max(tables, key=lambda cells: len(set(ENTRIES) & _names_in(cells)), default=[])
    missing = [stage for stage in ENTRIES if stage not in _names_in(fullest)]
    assert not missing, f"the table of stages in README.md has no row for {', '.join(missing)}"


def _names_in(cells: list[str]) -> set[str]:
    """The first word of each cell: "`profile@TEACHER`" and "[profile](...)" are profile."""
    return {word[0] for cell in cells if (word := re.findall(r"[a-z_]+", cell))}


def test_the_help_lists_the_stages_in_order() -> None:
    command = [sys.executable, "-m", "flows", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    line = re.search(r"^stages\n\s+(.*)$", done.stdout, re.MULTILINE)
    assert line, "--help has no line of stages"
    assert [part.split()[0] for part in line[1].split(" > ")] == list(ENTRIES)


# --- params and presets ----------------------------------------------------------------------


@every_params_file
def test_a_params_file_passes_the_check(path: Path) -> None:
    command = [sys.executable, "-m", "stages", "--check", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_laptop_preset_is_in_force() -> None:
    same = text("params.yaml") == text("presets/laptop.yaml")
    assert same, "cp presets/laptop.yaml params.yaml, or the other way round"


@every_params_file
def test_a_preset_says_its_own_name(path: Path) -> None:
    preset = yaml.safe_load(text(path))["preset"]
    assert preset == ("laptop" if path.name == "params.yaml" else path.stem)


@every_params_file
def test_every_knob_has_a_comment_on_its_line(path: Path) -> None:
    """The lines of a knob that is itself a table (one a stage) are covered by the knob's own."""
    bare = []
    for number, line in enumerate(text(path).splitlines(), start=1):
        knob = re.match(r"(  )?[a-z_]+:(.*)$", line)
        is_section = knob and not knob[1] and not knob[2].strip()
        if knob and not is_section and not re.search(r"\s#\s*\S", knob[2]):
            bare.append(f"{path.name}, line {number}: {line.strip()}")
    assert not bare, "say what it is, and its unit:\n" + "\n".join(bare)


@every_params_file
def test_there_are_few_enough_knobs(path: Path) -> None:
    def count(value: Any) -> int:
        return sum(map(count, value.values())) if isinstance(value, dict) else 1

    assert count(yaml.safe_load(text(path))) <= MOST_KNOBS


# --- dependencies ----------------------------------------------------------------------------


def closure_of(stage: str) -> set[Path]:
    """The files that make a stage's result: what its stage.py imports, directly or not."""
    todo, seen = [REPOSITORY / "stages" / stage / "stage.py"], set()
    while todo:
        path = todo.pop()
        if path in seen or path in CARRIERS:
            continue
        seen.add(path)
        found = {file for name in imports_in(path) if (file := file_of(name))}
        packages = {folder for file in found for folder in file.parents} - {*REPOSITORY.parents}
        todo += [*found, *(folder / "__init__.py" for folder in packages - {REPOSITORY})]
    return {path for path in seen if path.name != "__init__.py" or len(parse(path).body) > 1}


def looked_up(files: set[Path]) -> set[str]:
    """The registry's YAML files that some modules look up."""
    kinds = set()
    for path in files:
        for node in ast.walk(parse(path)):
            is_look = isinstance(node, ast.Call) and ast.unparse(node.func) in LOOKS
            if is_look and isinstance(node.args[0], ast.Constant):
                kinds.add(node.args[0].value)
            elif is_look:  # a variable: any kind that the file names
                leaves = [leaf for leaf in ast.walk(parse(path)) if isinstance(leaf, ast.Constant)]
                kinds |= {leaf.value for leaf in leaves} & set(KINDS)
    return {f"registry/{kind}.yaml" for kind in kinds}


def code_of(stage: str) -> list[str]:
    """The code deps that dvc.yaml ought to have, without the registry's YAML files."""
    folder = REPOSITORY / "stages" / stage
    files = {path for path in closure_of(stage) if folder not in path.parents}
    return sorted([f"stages/{stage}", *(path.relative_to(REPOSITORY).as_posix() for path in files)])


def declared_yaml(stage: str) -> dict[str, list[str]]:
    """The registry's YAML files that dvc.yaml declares: file -> keys, none for the whole file."""
    tables = [entry for entry in ENTRIES[stage]["params"] if isinstance(entry, dict)]
    whole = [dep for dep in ENTRIES[stage]["deps"] if re.fullmatch(r"registry/\w+\.yaml", dep)]
    return dict.fromkeys(whole, []) | dict(pair for table in tables for pair in table.items())


def upstream_of(stage: str) -> set[str]:
    """The stages that a stage reads from, those that they read from, and so on."""
    reads = {dep.split("/")[1] for dep in ENTRIES[stage]["deps"] if dep.startswith("artifacts/")}
    return reads.union(*(upstream_of(other) for other in reads))


@every_stage
def test_code_dependencies_are_what_the_stage_imports(stage: str) -> None:
    deps = [dep for dep in ENTRIES[stage]["deps"] if not dep.startswith("artifacts/")]
    declared = [dep for dep in deps if dep not in declared_yaml(stage)]
    expected = code_of(stage)
    assert sorted(declared) == expected, (
        f"deps of '{stage}' in dvc.yaml, besides artifacts and registry/*.yaml, ought to be:\n"
        + "\n".join(f"      - {name}" for name in expected)
    )


@every_stage
def test_registry_files_are_declared_by_those_who_look_them_up(stage: str) -> None:
    """Or by a stage before them, whose output is then another one."""
    needed = looked_up(closure_of(stage))
    own = set(declared_yaml(stage))
    before = {file for other in upstream_of(stage) for file in declared_yaml(other)}
    assert own <= needed, f"'{stage}' never looks up {', '.join(sorted(own - needed))}"
    missing = sorted(needed - own - before)
    assert not missing, f"'{stage}' looks up {', '.join(missing)}; declare it in dvc.yaml"


@every_stage
def test_a_stage_that_runs_once_a_teacher_depends_on_that_teachers_entry(stage: str) -> None:
    teachers = declared_yaml(stage).get("registry/teachers.yaml")
    assert (teachers == ["${item}"]) == (stage in ONCE_A_TEACHER)


@every_stage
def test_artifacts_are_declared_by_those_who_open_them(stage: str) -> None:
    opened = {
        node.args[0].value
        for path in (REPOSITORY / "stages" / stage).glob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("job.input", "job.inputs")
    }
    deps = [dep for dep in ENTRIES[stage]["deps"] if dep.startswith("artifacts/")]
    assert {dep.split("/")[1] for dep in deps} == opened
    assert opened <= set(ENTRIES)


@every_stage
def test_every_dependency_is_there_and_none_is_written_twice(stage: str) -> None:
    deps = ENTRIES[stage]["deps"]
    assert deps == sorted(set(deps)), "sorted, each once"
    files = [dep for dep in deps if not dep.startswith("artifacts/")] + list(declared_yaml(stage))
    missing = [name for name in files if not (REPOSITORY / name).exists()]
    assert not missing
