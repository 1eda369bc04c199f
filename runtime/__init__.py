"""Machinery that knows nothing of the method: ranks, sharding, signals, files, checkpoints, run folder.

Programs that use a GPU import a module of this folder before torch, whose allocator reads this variable once.
"""

import os

# The pages of a rollout are one segment. If training then takes pieces of it, such a segment serves no other
# stream and cannot go back to the driver, so that tens of GiB are lost. One that can shrink gives its rest
# back. PYTORCH_CUDA_ALLOC_CONF is the older name of the variable: either keeps the user's own settings.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
