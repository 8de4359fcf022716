"""Lessons that sft's trainers are compared on: what they change of test_finetuning.py's."""

from typing import Any

STEPS = 6
LESSONS: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "in parts": {"most_tokens": 22},  # two conversations at a time
    "without general text": {"general_rows": 0},
    "taken back": {"regression": 0.0, "validate_every": 1, "learning_rate": 0.5, "spike": 1e6},
}
