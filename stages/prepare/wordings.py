"""Ways to ask for one thing, some of which are kept for what is held out (wordings.yaml)."""

from dataclasses import dataclass
from pathlib import Path

from registry.strict import build_record, strict_yaml
from stages.prepare.splits import digest

FILE = Path(__file__).with_name("wordings.yaml")


@dataclass(frozen=True)
class Wordings:
    """str.format templates: those that train, and those that only held-out requests have."""

    training: tuple[str, ...]
    heldout: tuple[str, ...]

    def __post_init__(self) -> None:
        both = set(self.training) & set(self.heldout)
        if not self.training or not self.heldout or both:
            raise ValueError(
                f"'training' and 'heldout' share {sorted(both)}; name one each at least, and each "
                "in one list only"
            )

    def choose(self, key: str, heldout: bool, seed: int) -> tuple[str, bool]:
        """Give a template, and whether no request that trains has it.

        It depends on the key (what is asked about) and the seed alone.
        """
        drawn = int(digest(f"{seed}/wording/{key}"), 16)
        is_new = heldout and drawn % 2 == 1
        among = self.heldout if is_new else self.training
        return among[drawn // 2 % len(among)], is_new


def read_wordings(data_set: str) -> Wordings:
    """Give the wordings of one data set of wordings.yaml."""
    return build_record(Wordings, strict_yaml(FILE)[data_set], f"{FILE}, entry '{data_set}'")
