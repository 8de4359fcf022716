"""Teach skills by example: an adapter each."""
