"""Answers of a model: many rows at once, with tools that it calls while it writes."""
