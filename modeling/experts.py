"""Read only those experts of a block that are routed to, where few tokens go through together.

The experts of a mixture are most of its bytes, and a token uses k of E. N tokens that choose at
random leave (1 - k / E)^N of the experts unread; a router that repeats itself leaves more. A
read that waits for the router cannot begin while the block before computes, so below a coverage of
ROUTED_BELOW alone a block is *routed*: read without its experts, run up to them by every batch, and
given the union of what all batches chose. The module then holds those experts alone, in the order
of their ids, so its own code does the same sums in the same order: equal to the bit.

Found by structure, as transformers builds nearly all mixtures (integrations/moe.py): one module of
a block that is called with (hidden states, chosen ids, weights), each of whose parameters has
`num_experts` rows; in the checkpoint one tensor of as many rows, or one tensor an expert, that no
conversion mixes. Not covered, so read whole: experts that are quantised together or all compute
(llama4), experts without weights among the others (longcat_flash), parameters flattened over
experts (dbrx), and models that do not say how many of them a token chooses.
"""

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import MergeModulelist, WeightConverter, dot_natural_key

from modeling.checkpoint import Packed, Place
from modeling.packed import stored_places, unpack
from modeling.reading import Reader
from modeling.skeleton import Skeleton, Target

ROUTED_BELOW = 0.75  # expected share of a block's experts that are routed to
ALIGNMENT = 64  # bytes, of an expert's matrix: by it a kernel may choose how to add up
CHOSEN_PER_TOKEN = ("top_k", "top_k_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Experts:
    """The experts of one block.

    stored: expert -> name in the checkpoint -> where its part of that tensor lies.  joint: the
    names of tensors that hold all experts.
    """

    module: nn.Module
    stored: list[dict[str, Place | Packed]]
    joint: set[str]

    @property
    def names(self) -> set[str]:
        """The checkpoint's names of all experts' tensors."""
        return {name for places in self.stored for name in places}

    def number(self, chosen: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """The ids of all chosen experts in order, and the choices as places in that order.

        Choices that are no ids of experts (floats, masks, marks beyond the last) are left as they
        are, and all experts chosen.
        """
        every = range(len(self.stored))
        for ids in chosen:
            if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[-1] >= len(every):
                return list(every), list(chosen)
        union = torch.cat([ids.flatten() for ids in chosen]).unique()
        if not len(union) or union[0] < 0 or union[-1] >= len(every):
            return list(every), list(chosen)
        return union.tolist(), [torch.searchsorted(union, ids).to(ids.dtype) for ids in chosen]

    def make_room(self, count: int) -> None:
        """Let the module's parameters, which are empty, be those of so many experts."""
        for name, parameter in self.module._parameters.items():
            if parameter is not None:
                room = torch.empty(
                    (count, *parameter.shape[1:]), dtype=parameter.dtype, device="meta"
                )
                self.module._parameters[name] = nn.Parameter(room, requires_grad=False)

    def tensors(self, ids: Sequence[int], reader: Reader) -> dict[str, Tensor]:
        """Read some experts: the checkpoint's tensors of them alone, joint ones of fewer rows."""
        wanted = {id_: stored_places(self.stored[id_]) for id_ in ids}
        read = reader.read_now(
            {(name, id_): place for id_ in ids for name, place in wanted[id_].items()}
        )
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for id_ in ids:
            stored = {name: read[name, id_] for name in wanted[id_]}
            for name, tensor in unpack(self.stored[id_], stored).items():
                rows[name].append(tensor)
        return {
            name: _join(found, self.stored[0][name]) if name in self.joint else found[0]
            for name, found in rows.items()
        }


def _join(rows: list[Tensor], first: Place) -> Tensor:
    """Rows of a tensor in one, as aligned as in the file: matrix kernels round by alignment."""
    size, dtype = sum(row.nbytes for row in rows), rows[0].dtype
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=rows[0].device)
    wanted = 0 if first.offset % dtype.itemsize else first.offset  # as reading.view has it
    start = (wanted - raw.data_ptr()) % ALIGNMENT
    joined = raw[start : start + size].view(dtype).view(len(rows), *rows[0].shape[1:])
    return torch.cat(rows, out=joined)


def find_routed(
    skeleton: Skeleton, places: Mapping[str, Place | Packed], tokens: float
) -> dict[int, Experts]:
    """Block -> its experts, for blocks of which so many tokens use few enough of them."""
    routed = {}
    prefixes = {id(module): name for name, module in skeleton.model.named_modules()}
    for index, block in enumerate(skeleton.blocks):
        found = [module for module in block.modules() if holds_experts(module)]
        if len(found) != 1:
            continue
        module, count = found[0], found[0].num_experts
        chosen = _chosen_per_token(block, skeleton.model.config.get_text_config(), count)
        if chosen is None or 1 - (1 - chosen / count) ** tokens >= ROUTED_BELOW:
            continue
        names = {f"{prefixes[id(module)]}.{name}": p for name, p in module.named_parameters()}
        sources = {
            name: skeleton.targets[name]
            for name in skeleton.parts.get(index, [])
            if skeleton.targets[name].name in names
        }
        stored = _stored(sources, places, count)
        if stored and {target.name for target in sources.values()} == set(names):
            joint = {name for name in sources if name in stored[0] and name in stored[-1]}
            routed[index] = Experts(module, stored, joint)
    return routed


def holds_experts(module: nn.Module) -> bool:
    """Whether a module computes experts that are chosen by id, and holds nothing but theirs."""
    count, own = getattr(module, "num_experts", None), list(module.parameters(recurse=False))
    return (
        type(count) is int
        and count > 1
        and bool(own)
        and len(own) == len(list(module.parameters()))
        and not list(module.buffers())
        and all(parameter.ndim and parameter.shape[0] == count for parameter in own)
        and not any(p[0].numel() % ALIGNMENT for p in own if p.ndim > 2)  # so that none shifts
        and len(inspect.signature(module.forward).parameters) == 3
    )


def _chosen_per_token(block: nn.Module, config: PreTrainedConfig, count: int) -> int | None:
    """How many experts a token goes to, as the block's modules or the configuration say."""
    said = (
        getattr(place, n, None) for place in (*block.modules(), config) for n in CHOSEN_PER_TOKEN
    )
    return max((k for k in said if type(k) is int and 0 < k <= count), default=None)


def _stored(
    sources: Mapping[str, Target], places: Mapping[str, Place | Packed], count: int
) -> list[dict[str, Place | Packed]]:
    """Where each expert's part of each tensor lies; empty where experts are not kept apart."""
    groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name in sorted(sources, key=dot_natural_key):  # the order in which they are joined
        groups[sources[name].name, sources[name].pattern].append(name)
    stored: list[dict[str, Place | Packed]] = [{} for _ in range(count)]
    for group in groups.values():
        converter = sources[group[0]].converter
        if not _keeps_apart(converter):
            return []
        if converter is not None and isinstance(converter.operations[0], MergeModulelist):
            parts = [(name, places[name]) for name in group]
        else:
            parts = [(group[0], row) for row in _rows(places[group[0]])] if len(group) == 1 else []
        if len(parts) != count:
            return []
        for expert, (name, place) in zip(stored, parts, strict=True):
            expert[name] = place
    return stored


def _rows(place: Place | Packed) -> list[Place]:
    """A tensor's rows, each of a leading dimension of 1; none of one that is packed as a whole."""
    if isinstance(place, Packed) or not place.shape:
        return []
    size, shape = place.size // max(1, place.shape[0]), (1, *place.shape[1:])
    return [
        replace(place, offset=place.offset + row * size, size=size, shape=shape)
        for row in range(place.shape[0])
    ]


def _keeps_apart(converter: WeightConverter | None) -> bool:
    """Whether a conversion treats every expert alike, and knows the others only to stack them."""
    if converter is None:
        return True
    first, *others = converter.operations
    if isinstance(first, MergeModulelist):
        stacks = first.dim == 0
    else:
        stacks, others = True, converter.operations
    dims = [[v for name, v in vars(op).items() if name.startswith("dim")] for op in others]
    inner = all(found and min(found) > 0 for found in dims)
    return stacks and inner and len(converter.target_patterns) == 1
