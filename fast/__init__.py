"""Twins: each file computes one definition of a top-level file faster, and imports nothing of the project."""

import os

# A product and the sum after it are one instruction (FMA), which rounds once. Triton 3.9 warns on every start
# that does not choose, and 3.10 would choose the other value: more instructions, other digits.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
