"""Make a teacher's blocks narrower, and refit what is left in closed form.

From front to back, in each block that stays:
  1. attention: which heads stay is decided by a rule (least_squares.py), and o_proj is refitted on
     their columns, so that the state behind it is the teacher's again as well as can be
  2. MLP: likewise the neurons, and down_proj; where blocks behind it were dropped, the state wanted
     is the teacher's behind the gap, so that this closes gaps as well (student.py)
What goes is set to 0 meanwhile, which is the same as cutting it; it is cut at the end
(modeling/width.py). Each fit is on the states that the student really has by then.

Hidden dimensions go first, the same ones everywhere, those that have the least effect: the mean
square that a norm gives of a dimension, times the squares of the weights that read it, as a share
of the norm's whole, summed over all norms. A norm divides by the root mean square over what is
left, which is another number; its weight is scaled by the mean ratio of the two.

Differs from Minitron (Muralidharan 2024), which ranks by activations alone and refits nothing.
(SmolLM2-135M, one block, 3/4 of its neurons, held-out error of the MLP: 0.050 by activations, 0.038
refitted, 0.036 by elimination and refitted; benchmarks/width_rules.py.)

Letters: N tokens, D hidden width of the teacher, D' of the student.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.blocks import capture_calls, dissect, run_block
from modeling.width import Kept, Widths, columns, cut, keep_dimensions, parts_of, widths_of
from stages.distill.least_squares import Moments, Rule, eliminate
from stages.distill.student import Stream, build_student, caught_in, flat, token_weights


@dataclass(frozen=True)
class BlockFit:
    """What stays of one block, and the share of what was lost that refitting made up for (R^2)."""

    heads: Tensor
    kv_heads: Tensor
    neurons: Tensor
    attention: float
    mlp: float


def narrow(
    teacher: PreTrainedModel,
    dropped: list[int],
    sizes: Widths,
    tokens: Tensor,
    ridge: float,
    batch_rows: int,
    on_block: Callable[[BlockFit], None],
    rule: Rule = eliminate,
) -> tuple[PreTrainedModel, Tensor, list[BlockFit]]:
    """A copy of the teacher without some blocks and of smaller sizes.

    tokens (N, T): calibration rows, never trained or measured on.  on_block: told of each block.
    Gives the student, the dimensions of the teacher's hidden state that it has (D',), and its fits.
    """
    student = build_student(teacher, dropped)
    widths, blocks = widths_of(student), len(dissect(student).blocks)
    hidden = torch.arange(widths.hidden)
    if sizes.hidden < widths.hidden:
        hidden = choose_dimensions(teacher, tokens.split(batch_rows), sizes.hidden)
        student = without_dimensions(student, hidden, tokens.split(batch_rows))
        widths = replace(widths, hidden=sizes.hidden)
    streams = [Stream(teacher, student, batch) for batch in tokens.split(batch_rows)]
    fits = []
    for fit in refit_blocks(streams, dropped, hidden, widths, sizes, ridge, rule):
        fits.append(fit)
        on_block(fit)
    kept = replace(
        Kept.everything(widths, blocks),
        heads=[fit.heads for fit in fits],
        kv_heads=[fit.kv_heads for fit in fits],
        neurons=[fit.neurons for fit in fits],
    )
    return cut(student, kept), hidden, fits


# --- heads and neurons -----------------------------------------------------------------------


@torch.no_grad()
def refit_blocks(
    streams: list[Stream],
    dropped: list[int],
    hidden: Tensor,
    widths: Widths,
    sizes: Widths,
    ridge: float,
    rule: Rule,
) -> Iterator[BlockFit]:
    """Choose and refit, in place, one block of the student a step; what goes is set to 0.

    widths: of the student so far; hidden: the teacher's dimensions that it has (D',).
    """
    count = len(streams[0].teacher_blocks)
    kept = [block for block in range(count) if block not in set(dropped)]
    for place, (block, following) in enumerate(zip(kept, [*kept[1:], count], strict=True)):
        middles = [_behind_attention(stream, block)[:, hidden] for stream in streams]
        for stream in streams:
            stream.advance(following, place)
        parts = parts_of(streams[0].student_blocks[place])

        moments = Moments.none(parts.o_proj)
        for stream, wanted in zip(streams, middles, strict=True):
            a, given, _ = stream.student_layer(parts.o_proj)
            missing = wanted - flat(stream.student) - given
            moments = moments.plus(a, missing, token_weights(wanted))
        kv_heads, heads = choose_heads(moments, parts.o_proj, widths, sizes, ridge, rule)
        attention = _refit_on(parts.o_proj, moments, columns(heads, widths.head), ridge)

        moments = Moments.none(parts.down_proj)
        for stream in streams:
            a, _, output = stream.student_layer(parts.down_proj)
            wanted = flat(stream.teacher)[:, hidden]
            moments = moments.plus(a, wanted - output, token_weights(wanted))
        each = torch.arange(widths.ffn)
        weight = parts.down_proj.weight
        neurons = each
        if sizes.ffn < widths.ffn:
            neurons = rule(moments, weight, ridge, each[:, None], sizes.ffn)
        mlp = _refit_on(parts.down_proj, moments, neurons, ridge)
        yield BlockFit(heads, kv_heads, neurons, attention, mlp)


def choose_heads(
    moments: Moments, projection: nn.Linear, widths: Widths, sizes: Widths, ridge: float, rule: Rule
) -> tuple[Tensor, Tensor]:
    """The key/value heads that stay, and of each equally many query heads.

    moments: of o_proj, the projection.  widths: what there is; sizes: what there is to be.
    """
    group, weight = widths.group, projection.weight
    kv_heads = torch.arange(widths.kv_heads)
    heads = torch.arange(widths.heads)
    if sizes.kv_heads < widths.kv_heads:
        members = columns(heads, widths.head).view(widths.kv_heads, -1)
        kv_heads = rule(moments, weight, ridge, members, sizes.kv_heads)
        heads = columns(kv_heads, group)
    if sizes.group < group:
        for kv_head in kv_heads:
            here = columns(heads, widths.head)
            own = heads // group == kv_head
            places = torch.arange(len(here)).view(len(heads), -1)[own]
            left = moments.without(weight, here)
            stay = rule(left, weight[:, here], ridge, places, sizes.group)
            heads = torch.cat([heads[~own], heads[own][stay]]).sort().values
    return kv_heads, heads


def _refit_on(projection: nn.Linear, moments: Moments, kept: Tensor, ridge: float) -> float:
    """Let a layer have only the inputs `kept`, refitted; 0 for the others. Gives R^2."""
    update, explained = moments.without(projection.weight, kept).solve(ridge)
    weight = torch.zeros_like(projection.weight)
    weight[:, kept] = projection.weight[:, kept] + update.to(weight.dtype)
    projection.weight.copy_(weight)
    return explained


def _behind_attention(stream: Stream, block: int) -> Tensor:
    """The teacher's state between a block's attention and its MLP, (N, D); runs that block.

    Raises ValueError for a block that adds up otherwise, where o_proj could not be fitted to it.
    """
    module, before = stream.teacher_blocks[block], stream.teacher
    parts = parts_of(module)
    caught, output = caught_in(
        module, stream.teacher_calls, block, before, [parts.o_proj, parts.down_proj]
    )
    (_, attention), (_, mlp) = caught
    apart = (before + attention + mlp - output).float().norm() / output.float().norm()
    if not apart < 0.05:  # roundings of bfloat16 are a tenth of that
        raise ValueError(
            f"the output of {type(module).__name__} {block} is not its input plus that of o_proj "
            f"and of down_proj ({apart:.0%} apart), so they cannot be refitted: take a student "
            "with 'keep: null'"
        )
    stream.teacher, stream.teacher_at = output, block + 1
    return flat(before + attention)


# --- hidden dimensions -----------------------------------------------------------------------


@torch.no_grad()
def choose_dimensions(
    model: PreTrainedModel, batches: tuple[Tensor, ...], count: int, weigh_readers: bool = True
) -> Tensor:
    """The dimensions of the hidden state with the largest effect, ascending: (count,).

    Without `weigh_readers` by the norms' outputs alone, as Minitron has it.
    """
    readers = norms_and_readers(model)
    squares = [torch.zeros_like(norm.weight, dtype=torch.float32) for norm, _ in readers]

    def look(place: int, _before: Tensor, after: Tensor) -> None:
        squares[place] += after.square().sum(0)

    _watch_norms(model, batches, look)
    scores = torch.zeros_like(squares[0])
    for square, (_, layers) in zip(squares, readers, strict=True):
        effect = square.sqrt()
        if weigh_readers:
            effect = square * sum(layer.weight.float().square().sum(0) for layer in layers)
        scores += effect / effect.sum()
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


@torch.no_grad()
def without_dimensions(
    student: PreTrainedModel, hidden: Tensor, batches: tuple[Tensor, ...]
) -> PreTrainedModel:
    """The student with only the dimensions `hidden` (D',), its norms' weights scaled to match."""
    ratios = [[] for _ in norms_and_readers(student)]

    def look(place: int, before: Tensor, _after: Tensor) -> None:
        left = before[:, hidden].square().mean(-1) / before.square().mean(-1)
        ratios[place].append(left.sqrt())

    _watch_norms(student, batches, look)
    smaller = keep_dimensions(student, hidden)
    for (norm, _), ratio in zip(norms_and_readers(smaller), ratios, strict=True):
        norm.weight *= torch.cat(ratio).mean()
    return smaller


def norms_and_readers(model: PreTrainedModel) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Every norm of the hidden state, and the layers that read what it gives.

    Raises ValueError for a norm that is not a root mean square norm times its weight.
    """
    anatomy = dissect(model)
    found = []
    for block in anatomy.blocks:
        parts = parts_of(block)
        found.append((parts.norms[0], [parts.q_proj, parts.k_proj, parts.v_proj]))
        found.append((parts.norms[1], [parts.gate_proj, parts.up_proj]))
    found.append((anatomy.norm, [anatomy.head]))
    for norm, _ in found:
        given = norm(torch.ones_like(norm.weight))
        if not torch.allclose(given, norm.weight, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{type(norm).__name__} is not x / rms(x) times its weight, so 'hidden' cannot be "
                "made narrower: keep all of it"
            )
    return found


def _watch_norms(
    model: PreTrainedModel, batches: tuple[Tensor, ...], look: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Run rows through a model; `look` gets a norm's place, its input and its output, (N, D)."""
    norms = [norm for norm, _ in norms_and_readers(model)]
    handles = [
        norm.register_forward_hook(
            lambda _, inputs, output, place=place: look(place, flat(inputs[0]), flat(output))
        )
        for place, norm in enumerate(norms)
    ]
    try:
        for batch in batches:
            anatomy, calls = dissect(model), capture_calls(model, batch)
            hidden = calls.hidden
            for index, block in enumerate(anatomy.blocks):
                hidden = run_block(block, calls, index, hidden)
            anatomy.norm(hidden)
    finally:
        for handle in handles:
            handle.remove()
