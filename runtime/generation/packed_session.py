"""Decode rows with a packed model: prompts read once a group, keys and values in place.

Keys and values of prompts are kept once a group, those of what follows once a row, in memory that
is there already (it doubles when it is full); row_attention.py attends to both. A dropped row's
place is taken by the last row, and a prompt goes when the last of its rows does.

With a router, prompts are read without adapters as far as the last block whose states it reads;
then it chooses. Where the chosen adapters change nothing up to there, reading just goes on;
otherwise that prompt's first blocks are read again.

Letters: G groups, R rows, H query heads, K key/value heads, C size of a head, D hidden width.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.adapters.routing import Routing
from runtime.adapters.rows import Mix, deltas_of
from runtime.generation.packed_model import PackedBlock, PackedModel, Stream
from runtime.generation.row_attention import Groups, RowAttention
from runtime.generation.sessions import Session, of_rows

INSERTED_AT_ONCE = 16  # of a row; more would make every row's scores large
FIRST_ROOM = 64  # tokens behind the prompt
PREFILLED_AT_ONCE = 4096  # tokens of prompts, so that memory does not grow with their number


class PackedSession(Session):
    """Rows that are decoded from packed weights."""

    most_at_once = INSERTED_AT_ONCE

    def __init__(
        self,
        model: PackedModel,
        prompts: list[list[int]],
        candidates: int,
        mixes: Sequence[Mix] | None = None,
        routing: Routing | None = None,
    ) -> None:
        """Read the prompts (token ids, none empty).

        mixes: of adapters, one a prompt. routing: chooses them on the way instead.
        """
        groups, rows, longest = len(prompts), len(prompts) * candidates, max(map(len, prompts))
        super().__init__([[] for _ in range(rows)])
        self._model, self._routing = model, routing
        self._groups = Groups.of([row // candidates for row in range(rows)])
        self._prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        self._lengths = torch.zeros(rows, dtype=torch.long)  # behind the prompt
        self._prompts = [self._room(block, groups, longest) for block in model.blocks]
        self._behind = [self._room(block, rows, FIRST_ROOM) for block in model.blocks]
        last, used = [], []
        for part in (slice(*span) for span in spans(list(map(len, prompts)))):
            hidden, own = self._read(prompts[part], part.start, mixes and mixes[part])
            last.append(hidden)
            used += own or []
        self._first = model.logits(torch.cat(last)).repeat_interleave(candidates, 0)
        self._mixes = of_rows(used, candidates) if used else None

    def _room(self, block: PackedBlock, rows: int, tokens: int) -> Tensor:
        """Keys and values: (2, rows, K, tokens, C). Zeros: what is masked must be finite."""
        shape = (2, rows, block.kv_heads, tokens, self._model.head_size)
        return torch.zeros(shape, dtype=self._model.dtype)

    def _first_logits(self, ready: list[int]) -> Tensor:
        return self._first[ready]

    # --- prompts -----------------------------------------------------------------------------

    def _read(
        self, prompts: list[list[int]], first: int, mixes: Sequence[Mix] | None
    ) -> tuple[Tensor, Sequence[Mix] | None]:
        """Read prompts, the first one that of a group: last hidden states (G', D), and mixes."""
        blocks, groups = range(len(self._model.blocks)), range(first, first + len(prompts))
        begun, stream = 0, None
        if self._routing is not None:
            begun, found = self._routing.blocks[-1], []
            lengths = list(map(len, prompts))
            for first_block, block in pairwise((0, *self._routing.blocks)):
                part = blocks[first_block:block]
                stream = self._through(part, prompts, groups, stream=stream)
                found.append(self._routing.pool(prompts, stream.hidden.split(lengths)))
            mixes = self._route(torch.stack(found, 1), prompts, groups, stream.hidden)
        stream = self._through(blocks[begun:], prompts, groups, mixes, stream)
        last = torch.tensor(list(map(len, prompts))).cumsum(0) - 1
        return stream.hidden[last], mixes

    def _route(
        self, states: Tensor, prompts: list[list[int]], groups: range, hidden: Tensor
    ) -> list[Mix]:
        """Choose adapters by pooled states; those that begin before the last of their blocks are
        put into the hidden states (N, D) behind it."""
        lengths = list(map(len, prompts))
        routed = self._routing.choose(states)
        self.decisions += routed.decisions
        blocks = range(self._routing.blocks[-1])
        behind = {name for index in blocks for name in self._model.blocks[index].layers}
        early = [
            place
            for place, mix in enumerate(routed.mixes)
            if any(not behind.isdisjoint(adapter.layers) for adapter, _ in mix)
        ]
        if early:
            again = self._through(
                blocks,
                [prompts[place] for place in early],
                [groups[place] for place in early],
                [routed.mixes[place] for place in early],
            )
            parts, rows = again.hidden.split([lengths[p] for p in early]), hidden.split(lengths)
            for place, part in zip(early, parts, strict=True):
                rows[place].copy_(part)
        return routed.mixes

    def _through(
        self,
        blocks: range,
        prompts: list[list[int]],
        groups: Sequence[int],
        mixes: Sequence[Mix] | None = None,
        stream: Stream | None = None,
    ) -> Stream:
        """Take prompts through blocks, one behind the other without padding, from the embedding or
        from where a stream of them is; keys and values are kept."""
        lengths = list(map(len, prompts))
        if stream is None:
            tokens = torch.tensor([token for prompt in prompts for token in prompt])
            stream = self._model.begin(tokens, torch.cat([torch.arange(n) for n in lengths]))

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed, at = torch.empty_like(q), 0
            for group, length in zip(groups, lengths, strict=True):
                part = slice(at, at + length)
                own = [x[part].transpose(0, 1) for x in (q, k, v)]  # (H or K, T, C)
                kept = self._prompts[index][:, group, :, :length]
                kept[0], kept[1] = own[1], own[2]
                seen = scaled_dot_product_attention(
                    *(x[None] for x in own), is_causal=True, enable_gqa=True
                )
                mixed[part] = seen[0].transpose(0, 1)
                at += length
            return mixed

        deltas = deltas_of(mixes, lengths, stream.hidden.device)
        return self._model.through(blocks, stream, attend, deltas)

    # --- what follows ------------------------------------------------------------------------

    def _feed(self, tokens: list[list[int]], ready: list[int]) -> Tensor:
        counts = torch.tensor([len(taken) for taken in tokens])
        attention = RowAttention(self._groups, self._prompt_lengths, self._lengths, counts)
        self._grow(attention.behind)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self._prompts[index], self._behind[index])

        flat = torch.tensor([token for taken in tokens for token in taken])
        deltas = deltas_of(self._mixes, list(map(len, tokens)), flat.device)
        hidden = self._model.forward(flat, attention.positions, attend, deltas)
        self._lengths = self._lengths + counts
        last = (counts.cumsum(0) - 1)[ready]
        return self._model.logits(hidden if len(last) == len(hidden) else hidden[last])

    def _grow(self, tokens: int) -> None:
        """Make room for some tokens behind the prompt."""
        have = self._behind[0].shape[3]
        if tokens <= have:
            return
        room = max(tokens, 2 * have)
        for index, old in enumerate(self._behind):
            self._behind[index] = self._room(self._model.blocks[index], old.shape[1], room)
            self._behind[index][:, :, :, :have] = old

    # --- rows that go ------------------------------------------------------------------------

    def _forget(self, places: set[int]) -> list[int]:
        order = list(range(len(self._waiting)))
        for place in sorted(places, reverse=True):
            last = order.pop()
            if place < len(order):
                order[place] = last
                for kept in self._behind:
                    kept[:, place] = kept[:, len(order)]
        self._lengths = self._lengths[order]
        groups = [self._groups.of_row[place] for place in order]
        alive = sorted(set(groups))
        if len(alive) < len(self._prompt_lengths):
            self._prompt_lengths = self._prompt_lengths[alive]
            longest = int(self._prompt_lengths.max()) if alive else 0
            for index, kept in enumerate(self._prompts):  # one after the other: each is a copy
                self._prompts[index] = kept[:, alive, :, :longest]
        self._groups = Groups.of([alive.index(group) for group in groups])
        return order


def spans(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a list of lengths, first to end, where the sum would go past PREFILLED_AT_ONCE."""
    first = total = 0
    for index, length in enumerate(lengths):
        if index > first and total + length > PREFILLED_AT_ONCE:
            yield first, index
            first, total = index, 0
        total += length
    yield first, len(lengths)
