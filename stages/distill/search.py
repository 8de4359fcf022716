"""Which blocks to drop: greedily, harms measured again after every drop.

A ranking made on the whole teacher holds for one drop. Two blocks that do the same work are each
dispensable, but not both; so after each drop the most dispensable of the others are measured again
in the model that is left (greedy backward elimination; ShortGPT and Minitron rank once). Only
`width` candidates are measured a drop, those that added least harm when last measured, and the best
of them goes: what a block adds rises as others go, seldom falls, so what was far behind stays there
(lazy evaluation, Minoux 1978).

Letters: N rows, T tokens a row, D hidden width, V vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import Anatomy, BlockCalls, capture_calls, dissect, run_block
from modeling.losses import TeacherView

CHUNK_TOKENS = 512  # positions whose logits are compared at a time


class Search:
    """How far the search is: blocks dropped, in that order, and the harm that each added to.

    known: block -> the harm (KL from the teacher in nats a token) that its drop added when it was
    last measured: the profile's, of the block alone, until then.  harms: after each drop.
    """

    def __init__(self, harms: list[float], count: int, prefix: int) -> None:
        """harms: of each block alone.  count: of blocks to drop.

        The prefix always stays, and so does the block behind it, which has to be there to be
        refitted. Raises ValueError when there are not that many to choose from.
        """
        self.known = {block: harm for block, harm in enumerate(harms) if block > prefix}
        if count > len(self.known):
            raise ValueError(
                f"{count} blocks are to be dropped, but only {len(self.known)} of {len(harms)} "
                f"lie behind the shared prefix of {prefix}; lower extract.prefix_depth or take a "
                "larger student"
            )
        self.count = count
        self.dropped: list[int] = []
        self.harms: list[float] = []

    def candidates(self, width: int) -> list[int]:
        """The blocks of least known harm, the least first."""
        return sorted(self.known, key=lambda block: (self.known[block], block))[:width]

    @property
    def harm(self) -> float:
        """Of all blocks dropped so far."""
        return self.harms[-1] if self.harms else 0.0

    def drop(self, block: int) -> None:
        """Take a block out."""
        self.dropped.append(block)
        self.harms.append(self.harm + self.known.pop(block))

    def save(self, folder: Path) -> None:
        """Write search.json."""
        known = sorted(self.known.items())
        fields = {"known": known, "dropped": self.dropped, "harms": self.harms}
        (folder / "search.json").write_text(json.dumps(fields), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        fields = json.loads((folder / "search.json").read_text(encoding="utf-8"))
        self.known = dict(fields["known"])
        self.dropped, self.harms = fields["dropped"], fields["harms"]


@torch.no_grad()
def search_blocks(
    teacher: PreTrainedModel, batches: list[Tensor], search: Search, width: int
) -> Iterator[Search]:
    """Go on until enough blocks are dropped; yields after each.

    batches: calibration rows (N, T), never trained or measured on.  width: candidates a drop; with
    0 the first ranking is gone by.
    """
    scenes = [Scene(teacher, batch) for batch in batches] if width else []
    while len(search.dropped) < search.count:
        candidates = search.candidates(width or 1)
        if width:
            gone = set(search.dropped)
            harms = torch.stack([scene.harms(gone, candidates) for scene in scenes]).mean(0)
            added = (harms - search.harm).tolist()
            search.known.update(zip(candidates, added, strict=True))
        search.drop(min(candidates, key=search.known.__getitem__))
        yield search


class Scene:
    """One batch, and the teacher's own distribution on it."""

    def __init__(self, teacher: PreTrainedModel, tokens: Tensor) -> None:
        """tokens (N, T)."""
        self.anatomy: Anatomy = dissect(teacher)
        self.calls: BlockCalls = capture_calls(teacher, tokens)
        hidden = self._run(self.calls.hidden, range(len(self.anatomy.blocks)))
        self.views = [TeacherView.of(logits) for logits in self._logits(hidden)]

    def harms(self, gone: set[int], candidates: list[int]) -> Tensor:
        """KL from the teacher without `gone` and each candidate in turn: (C,) nats a token.

        Blocks before a candidate are run once for all.
        """
        blocks = range(len(self.anatomy.blocks))
        hidden, found = self.calls.hidden, {}
        for block in blocks:
            if block in candidates:
                rest = [after for after in blocks if after > block and after not in gone]
                found[block] = self._harm(self._run(hidden, rest))
            if block not in gone:
                hidden = self._run(hidden, [block])
        return torch.stack([found[block] for block in candidates])

    def _run(self, hidden: Tensor, blocks: range | list[int]) -> Tensor:
        for block in blocks:
            hidden = run_block(self.anatomy.blocks[block], self.calls, block, hidden)
        return hidden

    def _harm(self, hidden: Tensor) -> Tensor:
        pairs = zip(self.views, self._logits(hidden), strict=True)
        return torch.cat([view.kl(logits) for view, logits in pairs]).mean()

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """The logits (n, V) of a last state (N, T, D), some positions at a time."""
        for states in self.anatomy.normed(hidden).flatten(0, 1).split(CHUNK_TOKENS):
            yield self.anatomy.head(states)
