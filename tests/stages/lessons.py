"""What distillation needs, at a size for tests: a teacher, its subspaces, its targets."""

from pathlib import Path

import torch
from torch import Tensor

from modeling.blocks import dissect
from modeling.streaming import Passage
from modeling.weights import Resident
from stages.extract.harvest import Wanted, harvest
from stages.formats.importance import Subspaces
from stages.formats.targets import TeacherTargets, write_header, write_shard
from stages.profile.subspace import RunningCovariance
from tests.tiny import tiny_llama

BLOCKS, PREFIX, ANCHORS = 6, 2, (3, 5)
TOP_K, RANK, ROW_TOKENS = 12, 8, 16


def teacher(blocks: int = BLOCKS):
    """A llama as `open_model` opens it: weights in bfloat16, rotary frequencies not."""
    model = tiny_llama(blocks=blocks)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def rows(count: int, tokens: int = ROW_TOKENS, start: int = 0) -> Tensor:
    """Rows of a pattern in which each token follows from the one before it: (count, tokens)."""
    first = torch.arange(start, start + count)[:, None] * 7
    return (first + torch.arange(tokens)[None] * 5).remainder(97)


@torch.no_grad()
def block_outputs(model, tokens: Tensor) -> list[Tensor]:
    """What the model's own forward gets out of each of its blocks: (B, T, D) each."""
    outputs: list[Tensor] = []

    def keep(_module, _arguments, output) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in dissect(model).blocks]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def subspaces_of(model, tokens: Tensor, rank: int = RANK) -> Subspaces:
    """The principal subspaces of a model's block outputs."""
    outputs = block_outputs(model, tokens)
    found = []
    for output in outputs:
        covariance = RunningCovariance(output.shape[-1])
        covariance.add(output)
        found.append(covariance.principal())
    mean, directions, variance = (torch.stack(column) for column in zip(*found, strict=True))
    return Subspaces(mean, directions[:, :, :rank], variance)


def answers(model, tokens: Tensor, subspaces: Subspaces) -> dict[str, Tensor]:
    """What `extract` keeps of some rows."""
    return read_answers(model, tokens, TOP_K, PREFIX, ANCHORS, subspaces)


def read_answers(
    model, tokens: Tensor, top_k: int, prefix: int, anchors: tuple[int, ...], subspaces: Subspaces
) -> dict[str, Tensor]:
    """What `extract` keeps of one batch, with parameters of one's own."""
    blocks = dissect(model).blocks
    inputs = {"input_ids": tokens, "use_cache": False}
    passage = Passage(model, blocks, Resident(model), [inputs])
    kept: dict[str, Tensor] = {}
    for sheaf in harvest(passage, [tokens], Wanted(top_k, prefix, anchors, subspaces)):
        kept.update(sheaf.tensors)
    return kept


def write_targets(folder: Path, model, tokens: Tensor, shard_rows: int = 4) -> TeacherTargets:
    """Extract a model's targets into a folder and open them."""
    folder.mkdir(parents=True, exist_ok=True)
    subspaces = subspaces_of(model, tokens)
    for number, part in enumerate(tokens.split(shard_rows)):
        write_shard(folder, number, answers(model, part, subspaces))
    fields = {"teacher": "ada", "prefix_blocks": PREFIX, "anchors": ANCHORS}
    write_header(folder, **fields, rows=len(tokens), row_tokens=tokens.shape[1])
    return TeacherTargets(folder)


def weights_of(model) -> dict[str, Tensor]:
    """All of a model's tensors by name, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
