"""Attention of one step: each row's new tokens to its prompt, which it shares, and its own past.

The scores over the prompt are one product a group, with the queries of all its rows, so that a
prompt's keys are read once for all candidates (as in Hydragen, Juravsky 2024); those over what
follows are one product a row. One softmax goes over both, so nothing is approximate.

Letters: G groups, R rows, N new tokens of all rows, Q of the row with the most, H query heads, K
key/value heads, C size of a head, P tokens of the longest prompt, S tokens behind the prompt of the
longest row, the new ones among them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows share a prompt."""

    of_row: list[int]  # (R,) groups, each of which has a row
    members: Tensor  # (G * most,) rows; a group with fewer than the most repeats one
    places: Tensor  # (R,) where a row is among the members
    in_order: bool  # members and places are 0, 1, 2, ...

    @classmethod
    def of(cls, of_row: list[int]) -> "Groups":
        """From each row's group."""
        members: list[list[int]] = [[] for _ in range(max(of_row, default=-1) + 1)]
        for row, group in enumerate(of_row):
            members[group].append(row)
        most = max(map(len, members), default=0)
        filled = [row for rows in members for row in rows + rows[:1] * (most - len(rows))]
        places = [group * most + members[group].index(row) for row, group in enumerate(of_row)]
        in_order = places == list(range(len(filled)))
        return cls(of_row, torch.tensor(filled), torch.tensor(places), in_order)

    def gather(self, by_row: Tensor, groups: int) -> Tensor:
        """(R, K, ...) -> (G, most, K, ...)."""
        chosen = by_row if self.in_order else by_row[self.members]
        return chosen.unflatten(0, (groups, -1))

    def scatter(self, by_group: Tensor) -> Tensor:
        """(G, most, K, ...) -> (R, K, ...)."""
        every = by_group.flatten(0, 1)
        return every if self.in_order else every[self.places]


class RowAttention:
    """What is the same for all blocks of a step."""

    def __init__(
        self, groups: Groups, prompt_lengths: Tensor, lengths: Tensor, counts: Tensor
    ) -> None:
        """prompt_lengths (G,); lengths behind the prompt before the step, new tokens: (R,)."""
        self._groups, self._group_count = groups, len(prompt_lengths)
        self._rows, self._most = len(counts), int(counts.max())
        self.behind = int((lengths + self._most).max())  # S
        own_prompt = prompt_lengths[groups.of_row]
        steps = torch.arange(self._most)
        new = steps < counts[:, None]  # (R, Q)
        self._row = torch.arange(self._rows)[:, None].expand(new.shape)[new]  # (N,)
        self._column = (lengths[:, None] + steps)[new]  # (N,) where keys and values go
        self.positions = self._column + own_prompt[self._row]  # (N,)
        self._slots = None if new.all() else new.flatten()
        even = self._most == 1 and (lengths == lengths[0]).all()
        self._same_column = int(lengths[0]) if even else None
        if even and (own_prompt == own_prompt.max()).all():
            self._mask = None
        else:
            self._mask = self._masked(own_prompt, lengths, int(prompt_lengths.max()))

    def _masked(self, own_prompt: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """0 where a query sees a key, else -inf: (R, 1, Q, 1, P + S)."""
        in_prompt = torch.arange(longest) < own_prompt[:, None]  # (R, P)
        reach = lengths[:, None] + torch.arange(self._most)  # (R, Q) the last column that is seen
        in_row = torch.arange(self.behind) <= reach[..., None]  # (R, Q, S)
        seen = torch.cat((in_prompt[:, None].expand(-1, self._most, -1), in_row), -1)
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, :, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        """Keep new keys and values (N, K, C) in rows (2, >= R, K, >= S, C), and attend to them and
        to the prompts (2, G, K, P, C): q (N, H, C) -> (N, H, C)."""
        self._keep(rows, k, v)
        kv_heads, width = k.shape[1:]
        queries = self._by_row(q, kv_heads)  # (R, K, Q H/K, C)
        keys, values = rows[:, : self._rows, :, : self.behind].flatten(1, 2)  # (R K, S, C)
        prompt_keys, prompt_values = prompts.flatten(1, 2)  # (G K, P, C)
        of_prompt = self._with_prompts(queries, prompt_keys.mT)  # (R, K, Q H/K, P)
        of_row = torch.bmm(queries.flatten(0, 1), keys.mT).unflatten(0, (-1, kv_heads))
        scores = torch.cat((of_prompt, of_row), -1).mul_(width**-0.5)
        if self._mask is not None:
            scores.unflatten(2, (self._most, -1)).add_(self._mask)
        weights = scores.softmax(-1)
        longest = prompt_keys.shape[1]
        mixed = self._with_prompts(weights[..., :longest], prompt_values)  # (R, K, Q H/K, C)
        mixed += torch.bmm(weights[..., longest:].flatten(0, 1), values).view(mixed.shape)
        return self._by_token(mixed)

    def _keep(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        if self._same_column is not None:
            rows[0, : self._rows, :, self._same_column] = k
            rows[1, : self._rows, :, self._same_column] = v
        else:
            rows[0][self._row, :, self._column] = k
            rows[1][self._row, :, self._column] = v

    def _by_row(self, q: Tensor, kv_heads: int) -> Tensor:
        """(N, H, C) -> (R, K, Q H/K, C), rows with fewer new tokens filled with zeros."""
        if self._slots is not None:
            padded = q.new_zeros((len(self._slots), *q.shape[1:]))
            padded[self._slots] = q
            q = padded
        q = q.reshape(self._rows, self._most, kv_heads, -1, q.shape[-1])
        return q.transpose(1, 2).flatten(2, 3)

    def _by_token(self, mixed: Tensor) -> Tensor:
        """(R, K, Q H/K, C) -> (N, H, C)."""
        by_query = mixed.unflatten(2, (self._most, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return by_query if self._slots is None else by_query[self._slots]

    def _with_prompts(self, by_row: Tensor, of_groups: Tensor) -> Tensor:
        """Multiply each row's (K, M, X) with its group's (K, X, Y), of which all rows of a group
        share one product: (R, K, M, X), (G K, X, Y) -> (R, K, M, Y)."""
        grouped = self._groups.gather(by_row, self._group_count).transpose(1, 2)  # (G, K, c, M, X)
        kv_heads, most = grouped.shape[1:3]
        product = torch.bmm(grouped.flatten(2, 3).flatten(0, 1), of_groups)  # (G K, c M, Y)
        by_group = product.unflatten(0, (-1, kv_heads)).unflatten(2, (most, -1)).transpose(1, 2)
        return self._groups.scatter(by_group)
