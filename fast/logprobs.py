"""Equals grpo.token_logprobs_reference: for each chunk of tokens one matrix product and one Triton kernel.

Forward multiplies a chunk of hidden states with the weight (cuBLAS) and reads the logits once. Backward makes
the logits again, and a second kernel writes their gradient over them.

Axes: L reply tokens, D width, V vocabulary rows, C one chunk of L.
"""

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have no wheels; tools/plan.py reads the sizes below there too
    triton = None

CHUNK_TOKENS = 4096  # rows of logits that exist at once: enough to fill a large GPU
BLOCK = 4096  # logits of a row that a kernel holds at once


def token_logprobs(hidden_LD, weight_VD, targets_L, temperature, vocab_size=None):
    """(logp_L, entropy_L) as the definition returns them, on a GPU or in Triton's interpreter. hidden_LD,
    weight_VD: floats; targets_L: int64 below `vocab_size`, how many ids have a token; temperature > 0."""
    return FusedLogprobs.apply(hidden_LD, weight_VD, targets_L.contiguous(), temperature,
                               vocab_size or len(weight_VD))


class FusedLogprobs(torch.autograd.Function):
    """`token_logprobs` with its gradient for hidden_LD and weight_VD."""

    @staticmethod
    def forward(ctx, hidden_LD, weight_VD, targets_L, temperature, vocab_size):
        # The dtype of the products: that of the operands, or the one autocast casts them to.
        dtype = (hidden_LD[:0] @ weight_VD[:0].T).dtype
        options = {"dtype": torch.promote_types(dtype, torch.float32), "device": hidden_LD.device}
        logp_L, entropy_L, peak_L, log_total_L = (torch.empty(len(targets_L), **options) for _ in range(4))
        for part, _, logits_CV in logit_chunks(hidden_LD, weight_VD.to(dtype)):
            logprob_of_row[(len(logits_CV),)](
                logits_CV, targets_L[part], logp_L[part], entropy_L[part], peak_L[part], log_total_L[part],
                logits_CV.stride(0), len(weight_VD), vocab_size, 1 / temperature, BLOCK, num_warps=8)
        ctx.save_for_backward(hidden_LD, weight_VD, targets_L, peak_L, log_total_L)
        ctx.mark_non_differentiable(entropy_L)
        ctx.dtype, ctx.temperature, ctx.vocab_size = dtype, temperature, vocab_size
        return logp_L, entropy_L

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_L, _):
        hidden_LD, weight_VD, targets_L, peak_L, log_total_L = ctx.saved_tensors
        dlogp_L = dlogp_L.contiguous()  # the gradient of a sum is one number with stride 0
        dhidden_LD = torch.empty_like(hidden_LD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=peak_L.dtype) if ctx.needs_input_grad[1] else None
        factor_VD = weight_VD.to(ctx.dtype)
        for part, hidden_CD, logits_CV in logit_chunks(hidden_LD, factor_VD):
            C, V = logits_CV.shape
            gradient_of_logits[C, triton.cdiv(V, BLOCK)](
                logits_CV, targets_L[part], peak_L[part], log_total_L[part], dlogp_L[part],
                logits_CV.stride(0), V, ctx.vocab_size, 1 / ctx.temperature, BLOCK, num_warps=8)
            dhidden_LD[part] = logits_CV @ factor_VD
            if dweight_VD is None:  # the head is frozen beside adapters
                continue
            # In the precision of the sum: bf16 would lose the terms of many chunks.
            if dweight_VD.is_cuda and dweight_VD.dtype != hidden_CD.dtype:
                torch.addmm(dweight_VD, logits_CV.T, hidden_CD, out_dtype=dweight_VD.dtype, out=dweight_VD)
            else:
                dweight_VD.addmm_(logits_CV.T.to(dweight_VD.dtype), hidden_CD.to(dweight_VD.dtype))
        logits_CV = None  # free before the copy of a bf16 weight's gradient is made
        dweight_VD = dweight_VD if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        return dhidden_LD, dweight_VD, None, None, None


def logit_chunks(hidden_LD, weight_VD):
    """Yield (slice of L, hidden_CD, logits_CV) of each chunk, in the weight's dtype; logits share one buffer.

    Rows of ids without a token are multiplied too: else logits would start where tensor cores are slower.
    """
    buffer_CV = weight_VD.new_empty(min(CHUNK_TOKENS, len(hidden_LD)), len(weight_VD))
    for start in range(0, len(hidden_LD), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        hidden_CD = hidden_LD[part].to(weight_VD.dtype)
        yield part, hidden_CD, torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[:len(hidden_CD)])


if triton is not None:

    @triton.jit
    def logprob_of_row(logits_ptr, targets_ptr, logp_ptr, entropy_ptr, peak_ptr, log_total_ptr, row_stride,
                       V: tl.constexpr, vocab_size: tl.constexpr, SHARPNESS: tl.constexpr,
                       BLOCK: tl.constexpr):
        """Read one row of logits once: log-prob of its target, entropy, and the two numbers that backward
        makes its softmax from (online softmax, arXiv 1805.02867).

        With SHARPNESS = 1 / temperature and d = (logit - peak) SHARPNESS, the peak being the largest logit:
            log_total = log Σ e^d        log p = d - log_total        entropy = log_total - Σ d e^d / Σ e^d
        Peak and log_total are stored as two numbers: their sum, the log-sum-exp, would lose digits of it.
        """
        row = tl.program_id(0)
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        columns = tl.arange(0, BLOCK)
        dtype = logp_ptr.dtype.element_ty
        peak = tl.load(row_ptr).to(dtype)
        sum_e = tl.zeros([BLOCK], dtype)
        sum_de = tl.zeros([BLOCK], dtype)
        for start in range(0, vocab_size, BLOCK):
            # V is a multiple of 16 where vocab_size is odd: with V as the bound, one load reads 8 logits.
            logits = tl.load(row_ptr + start + columns, mask=start + columns < V, other=0.0).to(dtype)
            # Not -inf, at which d e^d would be NaN instead of 0.
            logits = tl.where(start + columns < vocab_size, logits, -1e30)
            new_peak = tl.maximum(peak, tl.max(logits, 0))
            # The sums were taken relative to the old peak.
            drop = (peak - new_peak) * SHARPNESS
            shrink = tl.exp(drop)
            d = (logits - new_peak) * SHARPNESS
            e = tl.exp(d)
            sum_de = (sum_de + drop * sum_e) * shrink + d * e
            sum_e = sum_e * shrink + e
            peak = new_peak
        total = tl.sum(sum_e, 0)
        # The peak alone counts 1, so this is never negative: no log-prob is above 0 and no entropy below.
        log_total = tl.log(total)
        target = tl.load(row_ptr + tl.load(targets_ptr + row)).to(dtype)
        tl.store(logp_ptr + row, (target - peak) * SHARPNESS - log_total)
        tl.store(entropy_ptr + row, log_total - tl.sum(sum_de, 0) / total)
        tl.store(peak_ptr + row, peak)
        tl.store(log_total_ptr + row, log_total)

    @triton.jit
    def gradient_of_logits(logits_ptr, targets_ptr, peak_ptr, log_total_ptr, dlogp_ptr, row_stride,
                           V: tl.constexpr, vocab_size: tl.constexpr, SHARPNESS: tl.constexpr,
                           BLOCK: tl.constexpr):
        """Overwrite a block of a row of logits with its gradient dlogp (onehot - p) SHARPNESS, which is 0 for
        ids without a token."""
        row = tl.program_id(0)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        logits_ptrs = logits_ptr + row.to(tl.int64) * row_stride + columns
        dtype = peak_ptr.dtype.element_ty
        logits = tl.load(logits_ptrs, mask=columns < V, other=0.0).to(dtype)
        p = tl.exp((logits - tl.load(peak_ptr + row)) * SHARPNESS - tl.load(log_total_ptr + row))
        onehot = (columns == tl.load(targets_ptr + row)).to(dtype)
        dlogits = tl.load(dlogp_ptr + row) * (onehot - p) * SHARPNESS
        tl.store(logits_ptrs, tl.where(columns < vocab_size, dlogits, 0.0), mask=columns < V)
