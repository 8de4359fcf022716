"""The registry: every entry is sound, and every way to get one wrong is refused with its name."""

import base64
import re
import shutil
import string
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from registry.catalog import FOLDER, KINDS, UnknownName, lookup, names, select
from registry.strict import BadEntry


def every(kind: str) -> list:
    return [lookup(kind, name) for name in names(kind)]


def edited_copy(folder: Path, kind: str, old: str, new: str) -> Path:
    """Copy the registry's YAML files to `folder` and replace the first `old` of one of them."""
    for path in FOLDER.glob("*.yaml"):
        shutil.copy(path, folder)
    path = folder / f"{kind}.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


# --- what is in it ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_parses_into_its_record(kind: str) -> None:
    assert every(kind)
    assert all(type(entry) is KINDS[kind] for entry in every(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_has_a_record_and_explains_itself(kind: str) -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)
    assert (FOLDER / f"{kind}.yaml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("kind", KINDS)
def test_no_name_is_also_a_tag_or_all(kind: str) -> None:
    tags = {tag for entry in every(kind) for tag in getattr(entry, "tags", ())}
    assert not set(names(kind)) & (tags | {"all"})
    assert "all" not in tags
    assert not any("," in word for word in [*names(kind), *tags])


def test_fifteen_teachers_stand_beside_the_offline_one() -> None:
    assert select("teachers", "offline") == ["smollm2-135m"]
    assert len(names("teachers")) == 15 + 1


def test_the_teachers_cover_the_modalities_that_the_seed_asks_for() -> None:
    covered = {teacher.modality for teacher in every("teachers")}
    covered |= {tag for teacher in every("teachers") for tag in teacher.tags}
    wanted = {"text", "code", "reasoning", "translation", "vision", "audio", "video"}
    assert wanted <= covered


def test_every_tier_of_a_teacher_exists_and_every_tier_has_a_teacher() -> None:
    assert {teacher.tier for teacher in every("teachers")} == set(names("tiers"))


def test_a_larger_tier_has_more_memory_a_higher_rank_and_a_longer_context() -> None:
    tiers = every("tiers")
    assert [tier.name for tier in tiers] == ["core", "pro", "ultra"]
    assert [tier.memory_gb for tier in tiers] == [8, 12, 16]
    assert [tier.max_rank for tier in tiers][1:] == [512, 1024]
    assert tiers[0].max_rank < tiers[1].max_rank
    assert [tier.context for tier in tiers] == [2048, 4096, 8192]


def test_a_language_model_reads_text_and_predicts_the_next_token() -> None:
    assert lookup("teachers", "smollm2-135m").is_language_model
    assert lookup("teachers", "mamba-130m").is_language_model
    assert not lookup("teachers", "madlad400-3b").is_language_model  # encoder-decoder
    assert not lookup("teachers", "qwen2-5-vl-7b").is_language_model  # sees pictures
    assert not lookup("teachers", "whisper-large-v3").is_language_model


def test_every_packaged_teacher_has_a_sha256_that_matches_the_installed_package() -> None:
    packages = [teacher.package for teacher in every("teachers") if teacher.package]
    assert packages
    for package in packages:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        try:
            files = metadata.files(package.name)
        except metadata.PackageNotFoundError:
            continue  # the extra `offline` is not installed: nothing to compare with
        (file,) = [file for file in files if str(file) == package.file]
        assert file.hash.mode == "sha256"
        assert file.hash.value == _base64_of(package.sha256)  # as pip recorded it


def _base64_of(hex_digits: str) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(hex_digits)).rstrip(b"=").decode()


def test_texts_tagged_offline_need_no_hub_and_the_rest_do() -> None:
    """`--datasets offline` is for texts; conversations are another list."""
    for entry in [*every("datasets"), *every("benchmarks")]:
        is_text_of_ours = entry.source.hub is None and entry.source.conversations is None
        assert ("offline" in entry.tags) == is_text_of_ours, entry.name


def test_every_text_template_names_the_columns_it_reads() -> None:
    for entry in [*every("datasets"), *every("benchmarks")]:
        if entry.text is None:
            continue
        columns = [field for _, field, _, _ in string.Formatter().parse(entry.text) if field]
        assert columns, entry.name


def test_a_nested_template_reads_a_row_as_the_hub_gives_it() -> None:
    chat = {"messages": [{"content": "2 + 2?"}, {"content": "4"}, {"content": "thanks"}]}
    assert lookup("datasets", "smoltalk").text.format(**chat) == "2 + 2?\n4"
    pair = {"translation": {"de": "Hallo", "en": "Hello"}}
    assert lookup("datasets", "opus-100-de-en").text.format(**pair) == "Hallo\nHello"


def test_no_dataset_is_the_split_that_a_benchmark_measures_with() -> None:
    measured = {benchmark.source for benchmark in every("benchmarks")}
    assert measured.isdisjoint(dataset.source for dataset in every("datasets"))


# --- looking up and selecting ----------------------------------------------------------------


def test_an_unknown_name_lists_the_near_and_the_known_names() -> None:
    with pytest.raises(UnknownName) as caught:
        lookup("teachers", "smollm2-135")
    message = str(caught.value)
    assert "unknown teacher 'smollm2-135'" in message
    assert "Did you mean smollm2-135m" in message
    assert all(name in message for name in names("teachers"))


def test_an_unknown_name_without_a_near_one_still_lists_the_known() -> None:
    with pytest.raises(UnknownName) as caught:
        lookup("tiers", "zzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert "core, pro, ultra" in str(caught.value)


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(UnknownName, match="unknown kind 'teacher'.*Did you mean teachers"):
        names("teacher")


def test_select_by_names_keeps_the_order_of_the_file_without_duplicates() -> None:
    chosen = select("students", "pruned-20, pruned-27,pruned-20")
    assert chosen == ["pruned-27", "pruned-20"]


def test_select_by_tag_gives_every_entry_with_that_tag() -> None:
    chosen = select("datasets", "offline")
    assert chosen == ["python-docs", "arithmetic"]
    assert all("offline" in lookup("datasets", name).tags for name in chosen)


def test_select_mixes_names_and_tags() -> None:
    assert select("datasets", "clinc150,offline") == ["python-docs", "arithmetic", "clinc150"]
    assert select("datasets", "arithmetic,offline") == ["python-docs", "arithmetic"]


@pytest.mark.parametrize("kind", KINDS)
def test_select_all_gives_everything(kind: str) -> None:
    assert select(kind, "all") == names(kind)
    assert select(kind, f"{names(kind)[0]},all") == names(kind)


def test_select_with_an_unknown_word_lists_names_and_tags() -> None:
    with pytest.raises(UnknownName) as caught:
        select("datasets", "arithmetic,ofline")
    message = str(caught.value)
    assert "'ofline'" in message
    assert "Did you mean offline" in message
    assert "clinc150" in message and "translation" in message


@pytest.mark.parametrize("spec", ["", "arithmetic,,c4", " "])
def test_select_refuses_an_empty_word(spec: str) -> None:
    with pytest.raises(UnknownName, match="unknown dataset or tag ''"):
        select("datasets", spec)


def test_changing_the_returned_list_does_not_change_the_registry() -> None:
    names("tiers").clear()
    assert len(names("tiers")) == 3


# --- what the loader refuses -----------------------------------------------------------------

REFUSED = {
    "an unknown field": ("teachers", "  gated: false", "  gatd: false", "unknown field 'gatd'"),
    "a missing field": ("tiers", "  memory_gb: 8\n", "", "field 'memory_gb' is missing"),
    "a tier of no context": ("tiers", "  context: 2048\n", "", "field 'context' is missing"),
    "a wrong type": ("tiers", "memory_gb: 8", "memory_gb: 8 GB", "'memory_gb'.*expected int"),
    "a truth value as a count": ("tiers", "memory_gb: 8", "memory_gb: true", "expected int"),
    "a word for a list": ("teachers", "[general, chat, offline]", "chat", "'tags'.*a list"),
    "a field written twice": (
        "tiers",
        "memory_gb: 8",
        "memory_gb: 8\n  memory_gb: 9",
        "'memory_gb' again",
    ),
    "a name used twice": ("tiers", "\npro:", "\ncore:", "'core' again"),
    "an unknown modality": ("teachers", "modality: text", "modality: smell", "'smell'; use one of"),
    "a short sha256": ("teachers", "sha256: b179c952", "sha256: ", "64 lower-case hex digits"),
    "a field unknown inside a field": (
        "datasets",
        "{python: python_docs}",
        "{pyton: python_docs}",
        "'source'.*unknown field 'pyton'",
    ),
    "two sources at once": (
        "datasets",
        "{python: python_docs}",
        "{python: python_docs, hub: a/b, split: c}",
        "exactly one of",
    ),
    "no source": ("datasets", "{python: python_docs}", "{}", "exactly one of"),
    "a hub source without a split": ("datasets", "{python: python_docs}", "{hub: a/b}", "split"),
    "a hub text without a template": ("benchmarks", 'text: "{text}"', "text: null", "'text'"),
    "a pruned student without blocks": (
        "students",
        "drop_blocks: 3",
        "drop_blocks: null",
        "needs 'drop_blocks'",
    ),
    "a mamba with attention heads": ("students", "state: 16", "state: 16, heads: 4", "'heads'"),
    "an unknown metric": ("benchmarks", "metric: pass@1", "metric: pass", "perplexity, kl, pass@1"),
    "text that is not YAML": ("tiers", "\ncore:", "\ncore: [", "not valid YAML"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_the_loader_refuses(fault: str, tmp_path: Path) -> None:
    kind, old, new, message = REFUSED[fault]
    folder = edited_copy(tmp_path, kind, old, new)
    with pytest.raises(BadEntry, match=message) as caught:
        names(kind, folder)
    assert f"{kind}.yaml" in str(caught.value)


def test_a_refusal_names_file_entry_and_field(tmp_path: Path) -> None:
    folder = edited_copy(tmp_path, "datasets", "  gated: false", "  gatd: false")
    with pytest.raises(BadEntry) as caught:
        lookup("datasets", "python-docs", folder)
    for part in (str(tmp_path / "datasets.yaml"), "'python-docs'", "'gatd'", "gated"):
        assert part in str(caught.value)


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiers.yaml").write_text("- name: core\n", encoding="utf-8")
    with pytest.raises(BadEntry, match="holds a list; write a mapping"):
        names("tiers", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tiers.yaml"):
        names("tiers", tmp_path)


def test_an_added_entry_is_found_in_the_folder_given(tmp_path: Path) -> None:
    folder = edited_copy(tmp_path, "tiers", "\ncore:", "\nmini:")
    assert names("tiers", folder) == ["mini", "pro", "ultra"]
    assert names("tiers") == ["core", "pro", "ultra"]


# --- what it costs ---------------------------------------------------------------------------


def test_the_registry_imports_no_torch_and_nothing_else_of_ours() -> None:
    code = (
        "import sys; from registry.catalog import KINDS, names; [names(kind) for kind in KINDS];"
        "print(*sorted({module.split('.')[0] for module in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "registry" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "datasets"})
    assert loaded.isdisjoint({"modeling", "runtime", "stages", "flows", "apps"})
