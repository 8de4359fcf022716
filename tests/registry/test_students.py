"""Students: an entry that no student can be built from is refused, saying which field and why."""

from pathlib import Path

import pytest

from registry.catalog import names
from registry.strict import BadEntry
from tests.registry.test_catalog import edited_copy

REFUSED = {
    "no block and no width to go": (
        "students",
        "drop_blocks: 0\n  keep: {ffn: 0.75}",
        "drop_blocks: 0\n  keep: null",
        "'drop_blocks' >= 1, or >= 0 with 'keep'.*is 0",
    ),
    "a width that no model has": (
        "students",
        "{ffn: 0.75}",
        "{fnn: 0.75}",
        "'fnn'.*fields are ffn, kv_heads, heads, hidden",
    ),
    "a width of nothing": ("students", "{ffn: 0.75}", "{ffn: 0.0}", "'ffn' is 0.0; give the share"),
    "a width of more": ("students", "{ffn: 0.75}", "{ffn: 1.5}", "'ffn' is 1.5; give the share"),
    "all widths whole": ("students", "{ffn: 0.75}", "{ffn: 1.0}", "write 'keep: null'"),
    "a new network that keeps a share": (
        "students",
        "keep: null\n  shape: {hidden: 128, blocks: 4, state",
        "keep: {ffn: 0.5}\n  shape: {hidden: 128, blocks: 4, state",
        "a mamba student needs 'shape', null 'drop_blocks' and null 'keep'",
    ),
    "heads that do not share the width": (
        "students",
        "heads: 8, kv_heads: 4",
        "heads: 7, kv_heads: 7",
        "512 hidden, 7 heads",
    ),
    "a size of nothing": ("students", "state: 16", "state: 0", "'state' is 0; a size is at least"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_entry_that_contradicts_itself_is_refused(fault: str, tmp_path: Path) -> None:
    kind, old, new, message = REFUSED[fault]
    with pytest.raises(BadEntry, match=message):
        names(kind, edited_copy(tmp_path, kind, old, new))
