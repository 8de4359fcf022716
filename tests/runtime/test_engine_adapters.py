"""Several adapters in one batch: each row says what its adapter alone would have it say."""

import random
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from modeling.lora import open_merged
from runtime.adapters.bank import AdapterBank, UnknownAdapter
from runtime.adapters.rows import RowDeltas
from runtime.generation.answers import Sampling
from runtime.generation.any_model import CachedSession, adding
from runtime.generation.engine import Engine
from runtime.generation.packed_model import PackedModel
from runtime.generation.packed_session import PackedSession
from tests.runtime.adapting import adapter_folder
from tests.runtime.conversing import CALL, PROMPT, Calculator, asker, encode, letters
from tests.tiny import tiny_llama, tiny_mamba

LLAMA, MAMBA = partial(tiny_llama, blocks=2), partial(tiny_mamba, blocks=2)
MANY = 8
GREEDY = Sampling(temperature=0, top_p=1, max_own_tokens=8, max_calls=0, seed=0)
SAMPLED = Sampling(temperature=1, top_p=1, max_own_tokens=8, max_calls=0, seed=0)
PATHS = pytest.mark.parametrize("kind", ["packed", "cached", "mamba"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, list[Path]]:
    """Adapters of several ranks and targets, by the kind of model."""
    place = tmp_path_factory.mktemp("adapters")
    targets = [(), ("q_proj", "v_proj"), (), ("down_proj",), ("k_proj", "o_proj", "up_proj")]
    llama = [
        adapter_folder(LLAMA, place / f"l{n}", n, "lora", 2 + n % 3, targets[n % 5])
        for n in range(MANY)
    ]
    mamba = [adapter_folder(MAMBA, place / f"m{n}", n, "rslora") for n in range(3)]
    return {"packed": llama, "cached": llama, "mamba": mamba}


def stock(kind: str) -> PreTrainedModel:
    return MAMBA() if kind == "mamba" else LLAMA()


def engine(kind: str, model: PreTrainedModel, folders: list[Path] | None, **options) -> Engine:
    """Decodes a model by a kind of path; adapters are '0', '1', ..."""
    bank = None
    if folders is not None:
        bank = AdapterBank(model, 1 << 24)
        for number, folder in enumerate(folders):
            bank.add(str(number), folder)
    made = Engine(model, letters(), half_weights=False, bank=bank, **options)
    if kind == "cached":
        made._packed = None
    made._ends = frozenset()  # random models end at random
    return made


def prompts(count: int) -> list[list[int]]:
    chance = random.Random(count)
    return [[chance.randrange(1, 97) for _ in range(3 + 2 * n % 7)] for n in range(count)]


@cache
def merged(folder: Path, kind: str) -> PreTrainedModel:
    return open_merged(stock(kind), folder)


@PATHS
def test_adapters_in_one_batch_give_the_tokens_of_one_by_one_and_of_merged_weights(
    kind: str, folders
) -> None:
    own = folders[kind]
    served = engine(kind, stock(kind), own)
    names = [None, *map(str, range(len(own))), "1"]
    several = prompts(len(names))
    mixed = served.answer(several, 2, GREEDY, names)
    assert len({tuple(group[0].tokens) for group in mixed}) > len(own) / 2
    for prompt, name, group in zip(several, names, mixed, strict=True):
        (alone,) = served.answer([prompt], 2, GREEDY, [name])
        model = stock(kind) if name is None else merged(own[int(name)], kind)
        (expected,) = engine(kind, model, None).answer([prompt], 2, GREEDY)
        for one, other, another in zip(group, alone, expected, strict=True):
            assert one.tokens == other.tokens == another.tokens
            assert one.log_probs == pytest.approx(another.log_probs, abs=1e-4)


@PATHS
def test_rows_have_the_logits_that_peft_gives_them_by_adapter_names(kind: str, folders) -> None:
    own = folders[kind][:3]
    wrapped = PeftModel.from_pretrained(stock(kind), own[0], "0")
    for number, folder in enumerate(own[1:], start=1):
        wrapped.load_adapter(folder, str(number))
    several, names = [prompt[:3] for prompt in prompts(4)], ["2", "0", "__base__", "1"]
    rows = [name if name != "__base__" else None for name in names]
    answers = engine(kind, stock(kind), own).answer(several, 1, SAMPLED, rows)
    tokens = torch.tensor([p + a.tokens for p, (a,) in zip(several, answers, strict=True)])
    with torch.no_grad():
        logits = wrapped.eval()(tokens, adapter_names=names).logits[:, 2:-1].log_softmax(-1)
    expected = logits.gather(-1, tokens[:, 3:, None])[..., 0]
    found = torch.tensor([answer.log_probs for (answer,) in answers])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@PATHS
def test_a_weighted_mix_adds_up_what_its_adapters_add(kind: str, folders) -> None:
    own, model = folders[kind], stock(kind)
    weights = {"0": 0.7, "2": -0.4}
    with torch.no_grad():
        for name, weight in weights.items():
            other = merged(own[int(name)], kind).state_dict()
            start = stock(kind).state_dict()
            for key, value in model.state_dict().items():
                value += weight * (other[key] - start[key])
    several = prompts(3)
    (_, expected, _) = engine(kind, model, None).answer(several, 2, SAMPLED)
    choices = ["0", weights, {"1": 0.0}]
    served = engine(kind, stock(kind), own).answer(several, 2, SAMPLED, choices)
    for one, other in zip(served[1], expected, strict=True):
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    core = engine(kind, stock(kind), None).answer(several, 2, SAMPLED)
    assert [a.tokens for a in served[2]] == [a.tokens for a in core[2]]


@PATHS
def test_without_an_adapter_not_a_bit_changes(kind: str, folders) -> None:
    model, several = stock(kind), prompts(3)
    expected = engine(kind, model, None).answer(several, 2, SAMPLED)
    served = engine(kind, model, folders[kind])
    assert served.answer(several, 2, SAMPLED) == expected
    assert served.answer(several, 2, SAMPLED, [None, {}, {"0": 0}]) == expected
    served.answer(several, 2, SAMPLED, ["0", "1", None])
    assert served.answer(several, 2, SAMPLED) == expected  # no trace is left
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["packed", "cached"])
def test_rows_fed_and_dropped_at_random_keep_their_adapters(kind: str, folders) -> None:
    chance, own = random.Random(3), folders[kind]
    bank = AdapterBank(LLAMA(), 1 << 24)
    for number in range(3):
        bank.add(str(number), own[number])
    held = bank.take("012")
    mixes = [((held["0"], 1.0),), (), ((held["1"], 1.0),), ((held["2"], 1.0),)]
    models = [merged(own[0], kind), LLAMA(), merged(own[1], kind), merged(own[2], kind)]
    several = prompts(4)
    opened = PackedModel(LLAMA(), False) if kind == "packed" else LLAMA()
    session = (PackedSession if kind == "packed" else CachedSession)(opened, several, 3, mixes)
    rows = [(list(prompt), which) for which, prompt in enumerate(several) for _ in range(3)]
    with torch.no_grad():
        ready, logits = session.start()
        while True:
            for place, found in zip(ready, logits, strict=True):
                expected = models[rows[place][1]](torch.tensor([rows[place][0]])).logits[0, -1]
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
            gone = chance.sample(ready, min(len(ready), chance.choice([0, 1, 1, 2])))
            if len(gone) == len(rows):
                break
            if gone:
                rows = [rows[place] for place in session.drop(gone)]
                ready = session._ready()
            fed = [[] for _ in rows]
            for place in ready:
                fed[place] = [chance.randrange(97) for _ in range(chance.choice([1, 1, 3]))]
                rows[place][0].extend(fed[place])
            ready, logits = session.step(fed)


def test_an_adapter_removed_while_a_batch_uses_it_stays_until_the_batch_ends(
    tmp_path: Path,
) -> None:
    folder = adapter_folder(LLAMA, tmp_path / "a", 0, targets=("v_proj",))
    greedy = Sampling(temperature=0, top_p=1, max_own_tokens=64, max_calls=2, seed=0)

    class Remover(Calculator):
        """Removes the adapter when the first row calls a tool."""

        def run_all(self, calls):
            bank.remove("a")
            return super().run_all(calls)

    def ask(tools: Calculator):
        made = Engine(asker(), letters(), tools, half_weights=False, bank=bank)
        return made.answer([encode(PROMPT), encode("hello")], 1, greedy, [None, "a"])

    bank = AdapterBank(asker(), 1 << 24)
    bank.add("a", folder)
    expected = ask(Calculator())
    assert expected[0][0].text.startswith(CALL)
    removed = ask(Remover())
    assert [[a.tokens for a in g] for g in removed] == [[a.tokens for a in g] for g in expected]
    with pytest.raises(UnknownAdapter):
        ask(Calculator())


def test_what_cannot_be_served_is_refused(folders) -> None:
    model, several = LLAMA(), prompts(2)
    served = engine("packed", model, folders["packed"][:1])
    with pytest.raises(ValueError, match="there are 1 adapters for 2 prompts"):
        served.answer(several, 1, GREEDY, ["0"])
    with pytest.raises(UnknownAdapter, match="no adapter 'x'; there are: 0"):
        served.answer(several, 1, GREEDY, ["0", "x"])
    with pytest.raises(ValueError, match="the weight of adapter '0' is nan"):
        served.answer(several, 1, GREEDY, ["0", {"0": float("nan")}])
    with pytest.raises(ValueError, match="there is no bank to take adapters 0 from"):
        engine("packed", model, None).answer(several, 1, GREEDY, [None, "0"])
    with pytest.raises(ValueError, match="adapters of another model"):
        Engine(LLAMA(), letters(), bank=served._bank)


def test_a_layer_that_gets_other_tokens_than_the_rows_is_refused(folders) -> None:
    model = LLAMA()
    bank = AdapterBank(model, 1 << 24)
    bank.add("a", folders["packed"][0])
    mixes = [((bank.take(["a"])["a"], 1.0),)]
    with (
        pytest.raises(ValueError, match="is called with 3 of 5 tokens"),
        adding(model, RowDeltas(mixes, [5], model.device)),
        torch.no_grad(),
    ):
        model(torch.tensor([[1, 2, 3]]))
    assert not any(module._forward_hooks for module in model.modules())
