"""The state that GRPO changes, and one step of it; interrupted work goes on to the same bits."""

import json
from pathlib import Path

from modeling.lora import trainable
from stages.grpo.params import Params
from stages.grpo.policy import Policy, Trace, accumulate, look_back
from stages.learning.training import TrainState
from stages.measuring.probing import Probe


class Reinforcement:
    """The adapter's training state, and the probes so far."""

    def __init__(self, policy: Policy, params: Params) -> None:
        self.policy, self.params = policy, params
        self.step = 0
        self.probes: list[Probe] = []
        self.training = TrainState(
            trainable(policy.adapted), params.learning_rate, params.steps * params.iterations
        )

    def learn(self, traces: list[Trace]) -> dict[str, float]:
        """Update the policy; nothing changes where no group had an advantage.

        Raises FloatingPointError for a gradient that is not finite.
        """
        p = self.params
        self.step += 1
        if not traces:
            for _ in range(p.iterations):
                self.training.pass_over()
            return {}
        look_back(self.policy, traces, p.beta)
        for _ in range(p.iterations):
            seen = accumulate(self.policy, traces, p.loss, p.epsilon, p.beta, p.max_own_tokens)
            norm = self.training.update(p.warmup, p.clip)
        return {**seen, "gradient_norm": norm}

    def save(self, folder: Path) -> None:
        """Write the training state, and reinforcement.json."""
        self.training.save(folder)
        fields = {"step": self.step, "probes": [vars(probe) for probe in self.probes]}
        (folder / "reinforcement.json").write_text(json.dumps(fields), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        self.training.load(folder)
        fields = json.loads((folder / "reinforcement.json").read_text(encoding="utf-8"))
        self.step, self.probes = fields["step"], [Probe(**entry) for entry in fields["probes"]]
