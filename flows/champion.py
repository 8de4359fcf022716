"""Whether a student takes the champion's place; lower metrics are better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """How tonight's student compares with the champion."""

    kind: str  # "promoted", "kept" or "regression"
    sentence: str


def compare(metric: str, values: dict[str, float], champion: float | None) -> Verdict:
    """Judge tonight's metrics against the champion's value; lower is better."""
    tonight, low = values[metric], values[f"{metric}_low"]
    if champion is None:
        return Verdict("promoted", f"{metric} {tonight:.4f}: the first champion")
    if tonight < champion:
        return Verdict("promoted", f"{metric} {tonight:.4f} beats the champion's {champion:.4f}")
    if low > champion:
        return Verdict(
            "regression",
            f"{metric} {tonight:.4f} is worse than the champion's {champion:.4f}, which lies below "
            f"its 95 % interval (from {low:.4f})",
        )
    return Verdict("kept", f"{metric} {tonight:.4f} is not clearly other than {champion:.4f}")
