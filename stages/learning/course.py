"""What can be set of training on conversations: part of the sections of sft and toolformer."""

from dataclasses import dataclass

from stages.params import require_at_least, require_within


@dataclass(frozen=True)
class Course:
    """How a skill is taught; comments and units stand in params.yaml."""

    steps: int
    batch_conversations: int
    general_rows: int
    general_weight: float
    most_tokens: int
    packing: bool
    learning_rate: float
    warmup: float
    clip: float
    validation_conversations: int
    validate_every: int
    spike: float
    regression: float
    forgetting: float
    fast_path: bool
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, steps=self.steps, batch_conversations=self.batch_conversations,
            most_tokens=self.most_tokens, validate_every=self.validate_every,
            validation_conversations=self.validation_conversations,
        )  # fmt: skip
        require_at_least(0, general_rows=self.general_rows, seed=self.seed)
        require_within(0.0, 10.0, general_weight=self.general_weight)
        require_within(1e-8, 1.0, learning_rate=self.learning_rate)
        require_within(0.0, 0.5, warmup=self.warmup)
        require_within(1e-3, 1e3, clip=self.clip)
        require_within(0.1, 1e6, spike=self.spike)
        require_within(0.0, 1e6, regression=self.regression)
        require_within(0.0, 10.0, forgetting=self.forgetting)
