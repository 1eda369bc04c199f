"""Machinery that knows nothing of the method: ranks, sharding, signals, files, checkpoints, run folder."""

import os

# The pages of a rollout are one segment. If training then takes pieces of it, such a segment serves no other
# stream and cannot go back to the driver, so that tens of GiB are lost. One that can shrink gives its rest
# back. torch reads the variable when CUDA is first used; the older name, where it is set, wins there.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
