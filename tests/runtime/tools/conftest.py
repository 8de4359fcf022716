"""One server with sympy for all tests of the calculator: it takes seconds to load."""

import pytest

from runtime.tools.dispatch import Limits, Tools


@pytest.fixture(scope="session")
def calculator():
    with Tools(("calc",), Limits(seconds=3.0, at_once=4)) as tools:
        yield tools
