"""The report's pictures, as PNG."""

import io

from stages.benchmark.findings import LABELS, STUDENT, Findings
from stages.benchmark.scoring import TEACHER

COLOURS = {
    STUDENT: "#4477aa", "before_training": "#bbbbbb", "text_only": "#ee7733",
    "without_anchors": "#228833", "without_text": "#aa3377", "without_answers": "#ccbb44",
}  # fmt: skip


def draw_drift(drift: dict[str, dict[int, float]]) -> bytes:
    """How far each model's states are from the teacher's, by the teacher's blocks."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(11, 3.2), layout="constrained")
    for name, blocks in drift.items():
        axis.plot(
            list(blocks), list(blocks.values()), "o-", markersize=4,
            color=COLOURS.get(name), label=LABELS.get(name, name),
        )  # fmt: skip
    axis.set(xlabel="block of the teacher", ylim=(0, None))
    axis.set_title(
        "drift: 0 the teacher's states, 1 those of another token", fontsize=10, loc="left"
    )
    axis.legend(frameon=False, fontsize=9)
    return _picture(figure)


def draw_chart(findings: Findings) -> bytes:
    """Perplexity ratio and KL of the student and its controls, by text, with intervals."""
    pyplot = _pyplot()
    models = [name for name in findings.table if name != TEACHER]
    width = 0.75 / len(models)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    titles = {
        "perplexity_ratio": "perplexity / teacher's",
        "kl": "KL from the teacher (nats a token)",
        "agreement": "top-1 agreement",
    }
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for offset, name in enumerate(models):
            estimates = [findings.table[name][text][measure] for text in findings.texts]
            values = [e.value for e in estimates]
            errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            places = [i + (offset - len(models) / 2 + 0.5) * width for i in range(len(values))]
            axis.bar(
                places,
                values,
                0.96 * width,
                yerr=errors,
                color=COLOURS.get(name),
                label=LABELS.get(name, name),
            )
        axis.set_xticks(range(len(findings.texts)), findings.texts, rotation=20, ha="right")
        axis.set_title(title, fontsize=10, loc="left")
    axes[0].axhline(1, color="black", linewidth=0.8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return _picture(figure)


def draw_capabilities(table: dict[str, dict[str, float]]) -> bytes:
    """Scores of right replies: capabilities of the queries by ways to choose an adapter."""
    pyplot = _pyplot()
    names = list(next(iter(table.values())))
    size = (2.4 + 0.72 * len(names), 1.4 + 0.42 * len(table))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    values = [[row[name] for name in names] for row in table.values()]
    axis.imshow(values, cmap="cividis", aspect="auto")
    low, high = min(map(min, values)), max(map(max, values))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value < (low + high) / 2
            axis.text(
                x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(table)), list(table), fontsize=8)
    axis.set_title("% of the right replies' tokens named first", fontsize=10, loc="left")
    return _picture(figure)


def _pyplot():
    """matplotlib's plots, drawn to memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _picture(figure) -> bytes:
    """A figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _pyplot().close(figure)
    return buffer.getvalue()
