"""What the parameters of stages that teach or measure skills must agree on with those of others.

Checked before anything runs (stages/contract.Stage.check_among): a name that nothing upstream makes
would else be noticed only after hours. Sections that are not there are not looked at.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Sections = Mapping[str, Any]  # the parameters of all stages, by name


def require_prepared(stage: str, names: Iterable[str], sections: Sections) -> None:
    """Refuse conversations that prepare does not make."""
    if prepare := sections.get("prepare"):
        for name in names:
            if name not in prepare.conversations:
                raise ValueError(
                    f"{stage} reads '{name}', which prepare does not make; add it to "
                    f"prepare.conversations (now {', '.join(prepare.conversations) or 'empty'})"
                )


def require_general_text(stage: str, sections: Sections) -> None:
    """Refuse a general text of which prepare makes no held-out rows."""
    name = sections[stage].general_text
    if (prepare := sections.get("prepare")) and name not in prepare.datasets:
        raise ValueError(
            f"{stage}.general_text is '{name}', which prepare does not read; name one of "
            f"prepare.datasets ({', '.join(prepare.datasets)})"
        )


def require_capability(stage: str, sections: Sections) -> None:
    """Refuse a capability that sft does not teach."""
    name = sections[stage].capability
    if sft := sections.get("sft"):
        known = [capability.name for capability in sft.capabilities]
        if name not in known:
            raise ValueError(
                f"{stage}.capability is '{name}', which sft does not teach; name one of "
                f"sft.capabilities ({', '.join(known)})"
            )


def require_probes(stage: str, sections: Sections) -> None:
    """Refuse more probes than half of what is held out; the other half is the benchmark's."""
    params, prepare = sections[stage], sections.get("prepare")
    if not prepare:
        return
    most = len(params.conversations) * prepare.heldout_conversations // 2
    if params.probe_problems > most:
        raise ValueError(
            f"{stage}.probe_problems is {params.probe_problems}, but of the held-out conversations "
            f"half may decide, which is {most}; lower it, or raise prepare.heldout_conversations "
            f"(now {prepare.heldout_conversations} a data set)"
        )
