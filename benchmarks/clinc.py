"""The router on CLINC150: 150 intents and queries that are none of them, beside MiniLM.

    NANOFOUNDRY_DATA=DATA .venv/bin/python benchmarks/clinc.py STUDENT OUT [--minilm FOLDER]

DATA: a folder with clinc150/data_full.json (Larson 2019).  STUDENT: a model's folder
(artifacts/distill/student).  The student reads all 23,700 queries as it would be shown them, once:
its pooled states stay in OUT, so that a run that is stopped, or repeated, goes on from there.

    router   a router on the student's states, trained as stage `route` trains (stages/route/
             fitting.py), but on 150 classes: more units, more steps; its blocks, temperature and
             threshold are of CLINC's own validation queries
    minilm   logistic regression on the sentence embeddings of a folder with all-MiniLM-L6-v2, a
             second model that would run for every query; C by validation

Printed on CLINC's test queries: how many of those in scope get their intent (none of them is no
answer here), how well confidence tells queries out of scope (AUROC), the expected calibration
error, and of those out of scope how many are taken for it.

Measured (laptop student of 24 blocks, which reads blocks 4, 8 and 12):

    way      in scope right  AUROC   calibration error  out of scope found
    router   95.31 %         0.9627  0.011              33.1 %
    minilm   95.44 %         0.9689  0.079              41.4 %
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from modeling.loading import open_model, open_tokenizer
from modeling.router import LossWeights, RouterShape, expected_calibration_error
from stages.route.fitting import Course, Labelled, best_depth
from stages.route.queries import Query
from stages.route.reading import States, batches, read_batch
from stages.route.scoring import auroc

NONE = "oos"
SPLITS = ("train", "val", "test")
COURSE = Course(1500, 256, 1e-3, 0.3, LossWeights(1e-4, 0.0, 0.0), 0)
HIDDEN = 1024
EVERY = 50  # batches between two writings of the states


def main() -> None:
    """Read, fit, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--minilm", type=Path, help="a folder with all-MiniLM-L6-v2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, classes, intents, splits = read_clinc(Path(os.environ["NANOFOUNDRY_DATA"]))
    options.out.mkdir(parents=True, exist_ok=True)
    states = student_states(options.student, texts, options.blocks, options.out)
    train, validation, test = (
        Labelled(states[splits[name]], classes[splits[name]]) for name in SPLITS
    )
    shape = RouterShape(tuple(intents), tuple(options.blocks), states.shape[-1], HIDDEN)
    router, losses = best_depth(train, validation, shape, COURSE, answered=0.97)
    print(f"router: reads blocks {router.shape.blocks}; validation loss by depth {losses}")
    print(
        "\n| way | in scope right | AUROC | calibration error | out of scope found |\n"
        + "|---" * 5
        + "|"
    )
    depth = len(router.shape.blocks)
    print(line("router", router.probabilities(test.first(depth).states), test.classes))
    if options.minilm is not None:
        embedded = embed(options.minilm, texts)
        found = regress(*(embedded[splits[n]] for n in SPLITS), train.classes, validation.classes)
        print(line("minilm", found, test.classes))


def read_clinc(data: Path) -> tuple[list[str], Tensor, list[str], dict[str, Tensor]]:
    """Queries, the class of each (the last: out of scope), intents, and places by split."""
    file = data / "clinc150" / "data_full.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    items = [(split, text, intent) for split, of in table.items() for text, intent in of]
    intents = sorted({intent for _, _, intent in items} - {NONE})
    classes = {intent: place for place, intent in enumerate([*intents, NONE])}
    places = {
        name: torch.tensor([n for n, (split, _, _) in enumerate(items) if split.endswith(name)])
        for name in SPLITS
    }
    labels = torch.tensor([classes[intent] for _, _, intent in items])
    return [text for _, text, _ in items], labels, intents, places


def student_states(folder: Path, texts: list[str], blocks: list[int], out: Path) -> Tensor:
    """Pooled states (N, B, D); goes on from what is in `out`."""
    student, tokenizer = open_model(folder), open_tokenizer(folder)
    states, file = States(len(texts), blocks), out / "states.safetensors"
    if file.exists():
        states.load(out)
    work = list(batches([Query(text, None) for text in texts], tokenizer, 64))
    for number, batch in enumerate(work[states.batches :], start=states.batches + 1):
        states.add(batch.places, read_batch(student, batch, blocks))
        if number % EVERY == 0 or number == len(work):
            states.save(out)
            print(f"read {number} of {len(work)} batches", flush=True)
    return states.found


@torch.no_grad()
def embed(folder: Path, texts: list[str]) -> Tensor:
    """Normalised mean embeddings (N, 1, 384) of a sentence encoder."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for first in range(0, len(texts), 64):
        given = tokenizer(texts[first : first + 64], padding=True, return_tensors="pt")
        mask = given["attention_mask"][..., None]
        mean = (model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(found)


def regress(
    train: Tensor, validation: Tensor, test: Tensor, known: Tensor, wanted: Tensor
) -> Tensor:
    """Probabilities (N, C + 1) of the logistic regression whose C is best on validation."""
    from sklearn.linear_model import LogisticRegression

    best = max(
        (LogisticRegression(C=c, max_iter=200).fit(train, known) for c in (10.0, 30.0, 100.0)),
        key=lambda model: model.score(validation, wanted),
    )
    return torch.from_numpy(best.predict_proba(test))


def line(name: str, probabilities: Tensor, classes: Tensor) -> str:
    """One row of the table, of probabilities (N, C + 1); the last is that of none."""
    inside = classes < probabilities.shape[1] - 1
    confidence, likeliest = probabilities[:, :-1].max(-1)
    hits = (likeliest == classes)[inside]
    error = expected_calibration_error(confidence[inside].tolist(), hits.tolist())
    found = (probabilities[~inside].argmax(-1) == probabilities.shape[1] - 1).double().mean()
    tells = auroc(confidence[inside], confidence[~inside])
    return f"| {name} | {hits.double().mean():.2%} | {tells:.4f} | {error:.3f} | {found:.1%} |"


if __name__ == "__main__":
    main()
