"""Capabilities: each is shown by data sets of its own, and belongs to a tier that exists."""

from pathlib import Path

import pytest

from registry.capabilities import Capability
from registry.catalog import UnknownName, lookup, names, select
from registry.strict import BadEntry
from tests.registry.test_catalog import edited_copy


def test_the_router_has_six_capabilities_to_choose_between() -> None:
    assert names("capabilities") == ["tools", "devops", "code", "docs", "dialogue", "translation"]
    assert lookup("capabilities", "code").conversations == ("python-code",)


def test_every_capability_is_shown_without_a_hub() -> None:
    for name in names("capabilities"):
        for data_set in lookup("capabilities", name).conversations:
            assert lookup("datasets", data_set).source.hub is None, name


def test_an_unknown_capability_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown capability 'tool'.*Did you mean tools.*devops"):
        lookup("capabilities", "tool")
    with pytest.raises(UnknownName, match="unknown capability or tag 'talk'"):
        select("capabilities", "talk")


REFUSED = {
    "an unknown data set": (
        "[python-code]",
        "[pyton-code]",
        "'pyton-code'. Did you mean python-co",
    ),
    "a data set of texts": ("[python-code]", "[python-docs]", "no data set of conversations"),
    "an unknown tier": ("tier: core", "tier: cor", "unknown tier 'cor'. Did you mean core"),
    "no data set": ("[devops]", "[]", "name at least one data set"),
    "a data set twice": ("[devops]", "[devops, devops]", "each once"),
    "a data set of two": ("[devops]", "[devops, small-talk]", "'small-talk' is also of 'devops'"),
    "an unknown field": ("  tier: core", "  tyer: core", "unknown field 'tyer'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_the_loader_refuses(fault: str, tmp_path: Path) -> None:
    old, new, message = REFUSED[fault]
    folder = edited_copy(tmp_path, "capabilities", old, new)
    with pytest.raises(BadEntry, match=message) as caught:
        names("capabilities", folder)
    assert "capabilities.yaml" in str(caught.value)


def test_a_capability_without_data_sets_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="'conversations'"):
        Capability("mute", (), "core", "Says nothing.")
