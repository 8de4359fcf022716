"""One picture of a teacher's profile: harm and influence by block, and the width of its outputs."""

from pathlib import Path

from stages.formats.importance import BlockImportance


def draw_profile(blocks: list[BlockImportance], title: str, path: Path) -> None:
    """Write a PNG: top, ablation harm with its intervals beside influence; below, ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    index = [block.block for block in blocks]
    harm = [block.harm for block in blocks]
    errors = [[b.harm - b.harm_low for b in blocks], [b.harm_high - b.harm for b in blocks]]
    figure, (top, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    top.bar(index, harm, yerr=errors, color="#4477aa", ecolor="#223355", label="ablation harm")
    top.set_yscale("log")
    top.set_ylabel("KL when skipped\n(nats a token)")
    twin = top.twinx()
    influence = [block.influence for block in blocks]
    twin.plot(index, influence, "o-", color="#ee7733", markersize=4, label="block influence")
    twin.set_ylabel("1 - cosine(in, out)")
    twin.set_ylim(0)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    for share, colour in ((90, "#88ccee"), (95, "#4477aa"), (99, "#223355")):
        ranks = [getattr(block, f"rank_{share}") for block in blocks]
        below.plot(index, ranks, "o-", markersize=3, color=colour, label=f"{share} %")
    below.set_xlabel("block")
    below.set_ylabel("directions holding\nthis share of variance")
    below.legend(frameon=False)
    top.set_title(title, loc="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
