"""Which blocks a student is anchored to: those that end equal shares of the profile's harm.

Harm behind the prefix is summed block by block; the n-th of N anchors is the block at which the sum
reaches n / N of the whole. So each anchor stands for as much work as the others, blocks that do
little (which are the ones that are dropped) lie between them, and the last block is always one.
"""

from itertools import accumulate


def choose_anchors(harms: list[float], prefix: int, count: int) -> tuple[int, ...]:
    """At most `count` blocks behind the prefix, rising; fewer where one ends several shares.

    harms: of each block of the teacher, nats a token.
    Raises ValueError for more anchors than there are blocks behind the prefix.
    """
    behind = len(harms) - prefix
    if count > behind:
        raise ValueError(
            f"'anchors' is {count}, but of {len(harms)} blocks only {behind} lie behind the prefix "
            f"of {prefix}, which no student computes; lower it or 'prefix_depth'"
        )
    sums = list(accumulate(max(harm, 0.0) for harm in harms[prefix:]))
    ends = [sums[-1] * part / count for part in range(1, count)]
    chosen = {prefix + next(i for i, total in enumerate(sums) if total >= end) for end in ends}
    return tuple(sorted(chosen | ({len(harms) - 1} if count else set())))
