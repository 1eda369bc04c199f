"""Twins: each file computes one definition of a top-level file faster, and imports nothing of the project."""
