"""Reinforce what a skill gets right: group relative policy optimisation."""
