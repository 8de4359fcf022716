"""Toy projects to run flows on; see tests/flows/project.py."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.project import Project, copy_project, make_project


@pytest.fixture(scope="session", autouse=True)
def tools_for_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let DVC's "python" be this one, and its notes of projects lie where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("dvc")))
        yield


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that ran through; only to be copied."""
    project = make_project(tmp_path_factory.mktemp("finished"))
    project.dvc("repro")
    return project


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project in which nothing ever ran, and the working folder."""
    monkeypatch.chdir(tmp_path)
    return make_project(tmp_path)


@pytest.fixture
def finished(finished_once: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that ran through, to be changed, and the working folder."""
    monkeypatch.chdir(tmp_path)
    return copy_project(finished_once, tmp_path)
