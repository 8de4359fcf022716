"""The retention matrix: what is left of each skill after each teacher, as numbers and a picture.

A row is a skill, one teacher's answers on rows that were never trained on; a column is the teacher
after which it was measured. An entry is held-out KL from that skill's teacher, or cross-entropy,
in nats a token; what is kept of a skill is the perplexity at its best over the perplexity now,
exp(best - now), at most 1.
"""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Retention:
    """Held-out losses by skill and by the teacher after which they were measured."""

    skills: tuple[str, ...]  # rows
    after: tuple[str, ...]  # columns, in the order of training
    losses: tuple[tuple[float, ...], ...]  # nats a token; a row a skill

    def kept(self) -> list[list[float]]:
        """exp(best - now) by skill and column, best: the least loss of the row so far.

        Columns before the best count from it as well: a skill that is yet to come is not kept.
        """
        return [[math.exp(min(row) - loss) for loss in row] for row in self.losses]

    def metrics(self) -> dict[str, float]:
        """Flat names: retention.SKILL.after.TEACHER, a loss; retention.SKILL.kept, at the end."""
        found = {
            f"retention.{skill}.after.{teacher}": loss
            for skill, row in zip(self.skills, self.losses, strict=True)
            for teacher, loss in zip(self.after, row, strict=True)
        }
        kept = zip(self.skills, self.kept(), strict=True)
        return found | {f"retention.{skill}.kept": row[-1] for skill, row in kept}

    def table(self) -> str:
        """The matrix as lines of text: loss, and what is kept in percent."""
        wide = max(len(name) for name in (*self.skills, *self.after)) + 2
        column = max(wide, 18)
        lines = [" " * wide + "".join(f"{'after ' + name:>{column + 6}}" for name in self.after)]
        for skill, row, kept in zip(self.skills, self.losses, self.kept(), strict=True):
            cells = (
                f"{f'{a:.4f} ({b:.1%})':>{column + 6}}" for a, b in zip(row, kept, strict=True)
            )
            lines.append(f"{skill:<{wide}}" + "".join(cells))
        return "\n".join(lines)


def draw_retention(retention: Retention, title: str, path: Path) -> None:
    """Write a PNG: the matrix, coloured by what is kept, each field with its loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = retention.kept()
    size = (2.5 + 1.8 * len(retention.after), 1.5 + 0.8 * len(retention.skills))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    image = axis.imshow(kept, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for row, losses in enumerate(retention.losses):
        for column, loss in enumerate(losses):
            text = f"{kept[row][column]:.1%}\n{loss:.3f} nats"
            ink = "black" if kept[row][column] > 0.6 else "white"
            axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    axis.set_xticks(range(len(retention.after)), [f"after {name}" for name in retention.after])
    axis.set_yticks(range(len(retention.skills)), retention.skills)
    axis.set_title(title, loc="left")
    figure.colorbar(image, label="share kept")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
