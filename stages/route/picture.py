"""One picture of a router: what is taken for what, how honest it is, what abstaining buys."""

from pathlib import Path

from stages.route.scoring import Routed, coverage_and_risk

BINS = 10


def draw_router(routed: Routed, title: str, path: Path) -> None:
    """Write a PNG of three panels: confusion, reliability, coverage and risk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    _confusion(panels[0], routed)
    _reliability(panels[1], routed)
    _risk(panels[2], routed)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _confusion(axes, routed: Routed) -> None:
    table = routed.confusion.double()
    shares = table / table.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    names = [*routed.names, "none"]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("routed to")
    axes.set_ylabel("wanted")
    for row in range(len(names)):
        for column in range(len(names)):
            if count := int(table[row, column]):
                colour = "black" if shares[row, column] > 0.5 else "white"
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)


def _reliability(axes, routed: Routed) -> None:
    inside = routed.inside
    confidence, hits = routed.confidence[inside], (routed.given == routed.classes)[inside]
    places = (confidence * BINS).long().clamp_max(BINS - 1)
    axes.plot([0, 1], [0, 1], "--", color="#999999", linewidth=1)
    for place in range(BINS):
        here = places == place
        if count := int(here.sum()):
            share = hits[here].double().mean().item()
            axes.bar((place + 0.5) / BINS, share, 0.9 / BINS, color="#4477aa")
            axes.text((place + 0.5) / BINS, share, count, ha="center", va="bottom", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right (numbers: queries in scope)")


def _risk(axes, routed: Routed) -> None:
    coverage, risk = coverage_and_risk(routed)
    axes.plot(coverage, risk, color="#4477aa")
    answered = (routed.given < len(routed.names)).double().mean().item()
    axes.axvline(answered, color="#ee7733", linewidth=1)
    axes.text(answered, 0.0, " answered", color="#ee7733", ha="left", va="bottom")
    axes.set_xlim(0, 1)
    axes.set_ylim(0)
    axes.set_xlabel("share of queries answered, the most confident first")
    axes.set_ylabel("share of these answered wrongly")
