"""The architecture, as far as a machine can see it: who imports whom, and how long things are.

The table is that of docs/architecture.md. Everything is read from the source; only what must not
be loaded is looked for in a fresh process.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import PACKAGES, imports_in, imports_of, lies_in, parse, python_files
from tests.tiny import REPOSITORY

MAY_IMPORT = {
    "registry": [],
    "modeling": ["registry"],
    "runtime": ["modeling", "registry"],
    "stages": ["runtime", "modeling", "registry"],
    "flows": ["registry"],
    "apps": ["runtime", "modeling", "registry", "stages.formats"],
}
DOORS = {
    "mlflow": ["flows/tracking.py"],
    "prefect": ["flows/pipeline.py", "flows/nightly.py"],
    "dvc": ["flows/plan.py"],
    "dvc_data": ["flows/plan.py"],
    "dvc_objects": ["flows/plan.py"],
    "accelerate": ["stages/ranks.py"],
    "bitsandbytes": ["stages/learning/optimizers.py"],
    "peft": ["modeling/lora.py"],
    "trl": ["stages/sft/trl_trainer.py"],
    "unsloth": ["modeling/unsloth_model.py"],
    "flash_attn": ["modeling/backends.py"],
    "mamba_ssm": ["modeling/backends.py"],
    "vllm": ["modeling/vllm_engine.py"],
    "faiss": ["runtime/retrieval/index.py"],
    "fastapi": ["apps/"],
    "gradio": ["apps/"],
}
WITHOUT_TORCH = ("registry", "flows")
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "mlflow", "prefect", "dvc", "datasets")
BROAD = ("Exception", "BaseException", "builtins.Exception", "builtins.BaseException")
LONGEST_FILE, LONGEST_FUNCTION = 300, 60

OURS = [path for name in PACKAGES for path in python_files(REPOSITORY / name)]
STAGES = sorted(path.parent.name for path in REPOSITORY.glob("stages/*/stage.py"))


def place(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def package_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).parts[0]


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages in a fresh process that has imported some modules."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


# --- who imports whom ------------------------------------------------------------------------


def forbidden_imports(names: dict[str, int], package: str) -> list[str]:
    """What a module of a package imports of other packages of ours though it may not."""
    allowed = [package, *MAY_IMPORT[package]]
    return [
        f"line {line}: {name}"
        for name, line in names.items()
        if name.split(".")[0] in PACKAGES and not any(lies_in(name, other) for other in allowed)
    ]


def test_every_package_imports_only_what_the_table_allows() -> None:
    wrong = [
        f"{place(path)}, {found}"
        for path in OURS
        for found in forbidden_imports(imports_in(path), package_of(path))
    ]
    assert not wrong, f"the table is {MAY_IMPORT}:\n" + "\n".join(wrong)


def test_no_stage_looks_into_another_stages_folder() -> None:
    wrong = [
        f"{place(path)}, line {line}: {name}"
        for path in python_files(REPOSITORY / "stages")
        for name, line in imports_in(path).items()
        for stage in STAGES
        if lies_in(name, f"stages.{stage}") and path.relative_to(REPOSITORY).parts[1] != stage
    ]
    shared = "stages/{formats,learning,measuring}"
    assert not wrong, f"what several stages need goes into {shared}:\n" + "\n".join(wrong)


def test_every_big_dependency_has_one_door() -> None:
    wrong = [
        f"{place(path)}, line {line}: {name} (only in {', '.join(DOORS[name.split('.')[0]])})"
        for path in OURS
        for name, line in imports_in(path).items()
        if name.split(".")[0] in DOORS
        and not any(place(path).startswith(door) for door in DOORS[name.split(".")[0]])
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_gets_round_the_table_by_importing_a_name_made_at_run_time() -> None:
    """`python -m stages NAME` has to; nobody else."""
    wrong = [
        f"{place(path)}, line {node.lineno}"
        for path in OURS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("import_module", "__import__"))
        and place(path) != "stages/__main__.py"
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_python_is_in_the_table() -> None:
    known = {*MAY_IMPORT, "tests", "benchmarks"}
    found = {path.relative_to(REPOSITORY).parts[0] for path in python_files()}
    assert found <= known, f"say in MAY_IMPORT what {', '.join(found - known)} may import"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import stages.prepare.stage", {"stages.prepare.stage"}),
        ("import flows as f, torch.nn as nn", {"flows", "torch.nn"}),
        ("from stages import prepare", {"stages.prepare"}),
        (
            "def f():\n    if True:\n        from stages.prepare import pack",
            {"stages.prepare.pack"},
        ),
        ("from ..prepare import pack", {"stages.prepare.pack"}),
        ("from . import objective", {"stages.distill.objective"}),
        ("from .objective import Loss", {"stages.distill.objective.Loss"}),
    ],
)
def test_no_spelling_of_an_import_escapes(code: str, names: set[str]) -> None:
    assert set(imports_of(ast.parse(code), "stages.distill")) == names


def test_a_forbidden_import_is_found_and_an_allowed_one_is_not() -> None:
    names = {"stages.formats.tokens.SPLITS": 1, "stages.distill.objective": 2, "flows": 3, "os": 4}
    assert forbidden_imports(names, "apps") == ["line 2: stages.distill.objective", "line 3: flows"]
    assert forbidden_imports(names, "stages") == ["line 3: flows"]
    assert len(forbidden_imports(names, "registry")) == 3


# --- what is not loaded ----------------------------------------------------------------------


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_a_package_without_torch_does_not_even_import_it_late(package: str) -> None:
    wrong = [
        f"{place(path)}, line {line}: {name}"
        for path in python_files(REPOSITORY / package)
        for name, line in imports_in(path).items()
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_a_package_without_torch_loads_none_by_any_way(package: str) -> None:
    modules = [
        place(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in python_files(REPOSITORY / package)
    ]
    assert not {"torch", "transformers"} & loaded_by(modules)


@pytest.mark.parametrize("stage", STAGES)
def test_reading_a_stages_parameters_loads_nothing_heavy(stage: str) -> None:
    """`python -m stages --check` imports all of them, and a person waits for it."""
    assert not set(HEAVY) & loaded_by([f"stages.{stage}.stage"])


def test_the_command_line_opens_without_anything_heavy() -> None:
    assert not set(HEAVY) & loaded_by(["flows.__main__"])


# --- length ----------------------------------------------------------------------------------


def test_no_file_is_longer_than_an_idea() -> None:
    lengths = {place(path): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    wrong = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LONGEST_FILE]
    assert not wrong, f"more than {LONGEST_FILE} lines; split by idea:\n" + "\n".join(wrong)


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = []
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    wrong.append(f"{place(path)}, line {node.lineno}: {node.name} has {lines}")
    assert not wrong, f"more than {LONGEST_FUNCTION} lines:\n" + "\n".join(wrong)


# --- bad habits ------------------------------------------------------------------------------


def edits_of_sys_path(tree: ast.Module) -> list[int]:
    """Lines where sys.path is so much as mentioned, or taken from sys, or got at by `site`."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site.addsitedir"):
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            lines += [node.lineno for alias in node.names if alias.name == "path"]
    return lines


def broad_excepts(tree: ast.Module) -> list[int]:
    """Lines with an except (or a suppress) that takes in everything."""
    lines = []
    for node in ast.walk(tree):
        caught: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            caught = [*node.type.elts] if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = [*node.args]
        if any(kind is None or ast.unparse(kind) in BROAD for kind in caught):
            lines.append(node.lineno)
    return lines


def test_nobody_edits_sys_path() -> None:
    wrong = [
        f"{place(path)}, line {line}"
        for path in python_files()
        for line in edits_of_sys_path(parse(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_a_door_catches_everything() -> None:
    wrong = [
        f"{place(path)}, line {line}"
        for path in python_files()
        if path.name != "__main__.py"
        for line in broad_excepts(parse(path))
    ]
    assert not wrong, "name the errors that can happen here:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "body", ["except:", "except Exception:", "except (ValueError, BaseException) as error:"]
)
def test_a_broad_except_is_found(body: str) -> None:
    assert broad_excepts(ast.parse(f"try:\n    pass\n{body}\n    pass"))
    assert broad_excepts(ast.parse("with contextlib.suppress(Exception): pass"))
    assert not broad_excepts(ast.parse("try:\n    pass\nexcept (OSError, ValueError):\n    pass"))


@pytest.mark.parametrize(
    "code", ["sys.path.insert(0, 'x')", "sys.path += ['x']", "from sys import path"]
)
def test_an_edit_of_sys_path_is_found(code: str) -> None:
    assert edits_of_sys_path(ast.parse(code)) == [1]
