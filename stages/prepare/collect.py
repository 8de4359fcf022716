"""Read all sources, one step each, so that a lost network costs one source at most."""

import json
from pathlib import Path

from registry.catalog import lookup
from stages.contract import Job
from stages.prepare.clean import Document
from stages.prepare.sources import read_documents


class Collected:
    """Documents read so far; what an interrupted download keeps."""

    def __init__(self) -> None:
        self.documents: dict[str, list[list[str]]] = {}  # "KIND/NAME" -> [id, text] pairs

    def save(self, folder: Path) -> None:
        """Write documents.json."""
        (folder / "documents.json").write_text(json.dumps(self.documents), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.documents = json.loads((folder / "documents.json").read_text(encoding="utf-8"))


def collect(
    datasets: tuple[str, ...], benchmarks: tuple[str, ...], sample_size: int, seed: int, job: Job
) -> tuple[list[Document], list[Document]]:
    """Give the documents of all data sets, at most `sample_size` each, and of all benchmarks."""
    limits = {("datasets", name): sample_size for name in datasets}
    limits |= {("benchmarks", name): 0 for name in benchmarks}
    state = job.resume(Collected(), "read")
    for step, ((kind, name), limit) in enumerate(limits.items(), start=1):
        if f"{kind}/{name}" not in state.documents:
            found = read_documents(lookup(kind, name), limit, seed)
            state.documents[f"{kind}/{name}"] = [list(pair) for pair in found]
            job.step_done(state, step, len(limits), "read", documents=len(found))

    def of(kind: str) -> list[Document]:
        return [
            Document(name, *pair)
            for other, name in limits
            if other == kind
            for pair in state.documents[f"{kind}/{name}"]
        ]

    return of("datasets"), of("benchmarks")
