"""The student measured against its teacher and its controls."""
