"""Machinery that knows nothing of the method: ranks, sharding, signals, files, checkpoints, run folder."""
