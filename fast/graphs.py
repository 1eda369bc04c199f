"""Equals sample.Decoder.step: the same step, replayed as a CUDA graph.

A GPU decodes a token faster than the host can launch the kernels for it; a graph launches them all at once.
It repeats them with the addresses and shapes of its capture. So the inputs of a step must keep their
addresses, a step must not depend on values that the host reads, and each batch size needs a graph.
"""

import torch


class Graphs:
    """Graphs of a step for a few batch sizes, each captured when first needed; all share one memory pool.

    step(B): one step of the rows in slots 0 … B - 1, B at most `slots`. inputs: the tensors that say what a
    step reads and where it writes. With zeros in them it must write to scratch memory only, which is page 0
    of fast/paged_cache.py: so do the first run of a batch size and the rows that pad a batch.
    """

    def __init__(self, step, slots, inputs):
        self.plain_step, self.slots, self.inputs = step, slots, inputs
        self.graphs, self.pool = {}, None

    def step(self, B):
        """One step of B rows, padded to the next batch size: a power of two, or a multiple of 64."""
        size = min(2 ** (B - 1).bit_length() if B <= 64 else -(-B // 64) * 64, self.slots)
        if size not in self.graphs:
            self.capture(size)
        self.graphs[size].replay()

    def capture(self, size):
        saved = [tensor.clone() for tensor in self.inputs]
        for tensor in self.inputs:
            tensor.zero_()
        # Compiling kernels and casting weights under autocast happen in a first run, outside the graph.
        self.plain_step(size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.plain_step(size)
        self.graphs[size], self.pool = graph, graph.pool()
        for tensor, values in zip(self.inputs, saved, strict=True):
            tensor.copy_(values)

    def close(self):
        """Drop the graphs, which point to memory that training moves."""
        self.graphs, self.pool, self.inputs, self.plain_step = {}, None, (), None
