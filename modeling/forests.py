"""Lay out rows that begin alike as a trie, so that each shared beginning is there once.

    forest = plant([[1, 2, 3, 4], [1, 2, 3, 5, 6]])     # with beginnings of 3 tokens shared
    forest.tokens               # [[1, 2, 3, 5, 6, 4]]
    forest.rows                 # [[0, 1, 2, 5], [0, 1, 2, 3, 4]]: where each row's tokens are

A shared beginning is a node, what follows it are its children; all nodes lie one behind the other,
without padding. Nodes of a level stand together in batches, for attention: a node's queries look at
the keys of the path from its root. Along a path positions rise, so that the causal mask is a
comparison of positions. modeling/shared_prefixes.py runs a model on that.

Letters: N tokens, B nodes in a batch, T tokens of its longest node, S tokens of its longest path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LEAST_SHARED = 8  # tokens that are made a node; fewer are computed for each row
MOST_PADDING = 2  # a batch's longest node by its shortest, at most


@dataclass(frozen=True)
class Batch:
    """Nodes whose attention is computed together."""

    queries: Tensor  # (B, T) int64, places of the nodes' tokens; 0 behind the last
    keys: Tensor  # (B, S) int64, places of their paths' tokens, their own included; 0 behind these
    seen: Tensor  # (B, 1, T, S) bool
    real: Tensor  # which of the B T queries are tokens, in order of their places


@dataclass(frozen=True)
class Forest:
    """Rows that share their beginnings."""

    tokens: Tensor  # (1, N) int64
    positions: Tensor  # (1, N) int64, from 0 in each row
    rows: list[Tensor]  # places of each row's tokens, (its length,) int64
    batches: list[Batch]


@dataclass
class _Node:
    """Tokens `start` to `stop` of some rows that have these, and all before them, in common."""

    rows: list[int]
    start: int
    stop: int
    level: int
    parent: "_Node | None"
    places: range = range(0)

    def __len__(self) -> int:
        return self.stop - self.start

    def path(self) -> list[int]:
        """The places from the root's first token to this node's last."""
        return [*(self.parent.path() if self.parent else ()), *self.places]


def plant(rows: Sequence[Sequence[int]], least_shared: int = LEAST_SHARED) -> Forest:
    """Lay out rows of token ids, none of them empty."""
    nodes: list[_Node] = []
    _grow(rows, list(range(len(rows))), None, least_shared, nodes)
    nodes.sort(key=lambda node: (node.level, -len(node)))
    tokens: list[int] = []
    positions: list[int] = []
    of_rows: list[list[int]] = [[] for _ in rows]
    for node in nodes:  # parents before children
        node.places = range(len(tokens), len(tokens) + len(node))
        tokens += rows[node.rows[0]][node.start : node.stop]
        positions += range(node.start, node.stop)
        for row in node.rows:
            of_rows[row] += node.places
    batches = [_batch(together) for together in _together(nodes)]
    places = [torch.tensor(found) for found in of_rows]
    return Forest(torch.tensor([tokens]), torch.tensor([positions]), places, batches)


def _grow(
    rows: Sequence[Sequence[int]],
    chosen: list[int],
    parent: _Node | None,
    least: int,
    nodes: list[_Node],
) -> None:
    """Add the nodes of what the chosen rows have behind a parent, which all of them share."""
    start, level = (parent.stop, parent.level + 1) if parent else (0, 0)
    alike: dict[tuple[int, ...], list[int]] = {}
    for index in chosen:
        beginning = tuple(rows[index][start : start + least])
        key = beginning if len(beginning) == least else (-1, index)  # too short to be shared
        alike.setdefault(key, []).append(index)
    for group in alike.values():
        stop = _common(rows, group, start)
        node = _Node(group, start, stop, level, parent)
        if len(node):
            nodes.append(node)
        if len(group) > 1:
            _grow(rows, group, node if len(node) else parent, least, nodes)


def _common(rows: Sequence[Sequence[int]], group: list[int], start: int) -> int:
    """How far rows that are alike up to `start` stay so."""
    first, last = min(rows[index] for index in group), max(rows[index] for index in group)
    stop = start
    while stop < min(len(first), len(last)) and first[stop] == last[stop]:
        stop += 1
    return stop


def _together(nodes: list[_Node]) -> list[list[_Node]]:
    """Nodes of a level with lengths not too far apart, in order."""
    batches: list[list[_Node]] = []
    for node in nodes:
        longest = batches[-1][0] if batches else node
        if batches and longest.level == node.level and len(longest) <= MOST_PADDING * len(node):
            batches[-1].append(node)
        else:
            batches.append([node])
    return batches


def _batch(nodes: list[_Node]) -> Batch:
    queries = pad_sequence([torch.tensor(node.places) for node in nodes], True)
    keys = pad_sequence([torch.tensor(node.path()) for node in nodes], True)
    starts = torch.tensor([node.start for node in nodes])
    lengths = torch.tensor([len(node) for node in nodes])
    step = torch.arange(queries.shape[1])
    position = starts[:, None] + step  # (B, T); a path's position is its index
    seen = torch.arange(keys.shape[1]) <= position[..., None]  # (B, T, S)
    real = (step < lengths[:, None]).flatten().nonzero()[:, 0]
    return Batch(queries, keys, seen[:, None], real)
