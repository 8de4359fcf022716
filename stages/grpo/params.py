"""What can be set of grpo."""

from dataclasses import dataclass

from stages.params import require_at_least, require_one_of, require_within

LOSSES = ("grpo", "dr_grpo", "dapo")  # of objective.py, which imports torch


@dataclass(frozen=True)
class RewardWeights:
    """How much each reward counts; 0 leaves it out."""

    correctness: float
    format: float
    brevity: float
    symbols: float
    citation: float
    judge: float

    def __post_init__(self) -> None:
        require_at_least(0, **vars(self))


@dataclass(frozen=True)
class Params:
    """The section `grpo` of params.yaml; comments and units stand there."""

    capability: str
    conversations: tuple[str, ...]
    steps: int
    prompts: int
    candidates: int
    iterations: int
    temperature: float
    top_p: float
    max_own_tokens: int
    max_calls: int
    most_tokens: int
    learning_rate: float
    warmup: float
    clip: float
    loss: str
    epsilon: float
    beta: float
    rewards: RewardWeights
    judge: str
    probe_problems: int
    probe_every: int
    general_text: str
    heldout_rows: int
    forgetting: float
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, steps=self.steps, prompts=self.prompts, iterations=self.iterations,
            max_own_tokens=self.max_own_tokens, most_tokens=self.most_tokens,
            probe_every=self.probe_every, probe_problems=self.probe_problems,
        )  # fmt: skip
        require_at_least(2, candidates=self.candidates, heldout_rows=self.heldout_rows)
        require_at_least(0, max_calls=self.max_calls, beta=self.beta, seed=self.seed)
        require_within(1e-3, 10.0, temperature=self.temperature)
        require_within(1e-3, 1.0, top_p=self.top_p, epsilon=self.epsilon)
        require_within(1e-8, 1.0, learning_rate=self.learning_rate)
        require_within(0.0, 0.5, warmup=self.warmup)
        require_within(1e-3, 1e3, clip=self.clip)
        require_within(0.0, 10.0, forgetting=self.forgetting)
        require_one_of(LOSSES, loss=self.loss)
        if not self.conversations:
            raise ValueError("'conversations' is empty; name data sets whose answers are known")
