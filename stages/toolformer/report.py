"""What was found of calls: counts for the metrics, and samples that a person can check."""

from dataclasses import dataclass
from pathlib import Path

from stages.formats.conversations import Conversation
from stages.learning.number_masking import NUMBER
from stages.toolformer.proposals import Text
from stages.toolformer.usefulness import Judged

SAMPLES = 15  # of the kept, and as many of the refused
CONTEXT = 120  # characters before a call


@dataclass(frozen=True)
class Found:
    """All calls that were written, those that gave a result, and those that were kept.

    told: the texts with the kept calls in their places.
    """

    texts: list[Text]
    written: int
    judged: list[Judged]
    kept: list[Judged]
    told: list[Conversation]

    @property
    def counts(self) -> dict[str, float]:
        """Flat numbers. calls_to_the_point: kept ones that give the number the text tells next."""
        return {
            "texts": len(self.texts),
            "calls_written": self.written,
            "calls_judged": len(self.judged),
            "calls_kept": len(self.kept),
            "texts_with_calls": len(self.told),
            "calls_to_the_point": sum(map(self._is_to_the_point, self.kept)),
        }

    def _is_to_the_point(self, one: Judged) -> bool:
        told = NUMBER.search(self._after(one))
        return told is not None and told.group() == str(one.proposal.result.value)

    def _before(self, one: Judged) -> str:
        text = self.texts[one.proposal.place.text]
        return text.conversation.reply[: text.starts[one.proposal.place.token]]

    def _after(self, one: Judged) -> str:
        text = self.texts[one.proposal.place.text]
        return text.conversation.reply[text.starts[one.proposal.place.token] :]

    def describe(self, one: Judged) -> list[str]:
        """Lines about one call."""
        losses = (one.nothing, one.without_result, one.with_result)
        return [
            f"- usefulness {one.usefulness:+.3f} nats (nothing {losses[0]:.3f}, call alone "
            f"{losses[1]:.3f}, with result {losses[2]:.3f})",
            "  ```",
            *(f"  {line}" for line in self._before(one)[-CONTEXT:].splitlines()),
            f"  {one.proposal.call.text} -> {one.proposal.result.value}",
            *(f"  {line}" for line in self._after(one)[:CONTEXT].splitlines()),
            "  ```",
        ]


def write_samples(found: Found, path: Path) -> None:
    """Write some of the kept calls, from the least useful to the most, and the best refused."""
    kept = sorted(found.kept, key=lambda one: one.usefulness)
    chosen = {id(one) for one in found.kept}
    refused = [one for one in found.judged if id(one) not in chosen]
    refused.sort(key=lambda one: -one.usefulness)
    step = max(1, len(kept) // SAMPLES)
    lines = ["# Calls that the model proposed", ""]
    for title, ones in (("Kept", kept[::step][:SAMPLES]), ("Refused", refused[:SAMPLES])):
        lines += [f"## {title}", ""]
        lines += [line for one in ones for line in found.describe(one)]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
