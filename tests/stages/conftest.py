"""Projects to run stages in; see tests/stages/project.py."""

from pathlib import Path

import pytest

from tests.stages.project import DONE, Project, make_project


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose walk ran through; what every disturbed one has to equal."""
    project = make_project(tmp_path_factory.mktemp("undisturbed"))
    assert project.run("walk").returncode == DONE
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)
