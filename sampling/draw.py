"""The draw: from logits and uniform numbers to tokens and their log-probs.

Inverse CDF: a row's token is a function of its logits and its own uniform number alone. torch's
global generator is not touched.
"""

import math

import torch
from torch import Tensor

from kernels import native

ROWS_AT_ONCE = {"cpu": 8}                               # by device: few rows stay in a CPU's cache


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniforms [B] float64 -> (tokens [B], logprobs [B]).

    The log-probs are of the distribution drawn from. Greedy ones are the model's at temperature 1.
    A row that is not finite gets the log-prob NaN.
    """
    filters = top_k or top_p < 1 or min_p > 0
    if not filters and native.usable(logits):
        tokens, logprobs = (torch.empty(len(logits), dtype=kind)
                            for kind in (torch.long, torch.float32))
        native.run("draw", logits.numel(), logits, logits.contiguous(), uniforms.double(),
                   tokens, logprobs, *logits.shape, temperature)
        return tokens, logprobs
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    size = ROWS_AT_ONCE.get(logits.device.type, 512)
    parts = [sample_rows(*rows, temperature, top_k, top_p, min_p)
             for rows in zip(logits.split(size), uniforms.split(size), strict=True)]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def sample_rows(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float,
                min_p: float) -> tuple[Tensor, Tensor]:
    """`sample` for a few rows, logits [B, V] fp32, at a positive temperature.

    With p = softmax(logits / temperature), after `filtered(logits / temperature, ...)` if there is
    a filter: a row's token is the first j with p_0 + ... + p_j > its uniform number (so never one
    of p = 0), int64, and its log-prob is log p_j, fp32. -inf means p = 0; a row with a NaN or +inf,
    or of -inf alone, gets the log-prob NaN, and any valid id.

    For speed, one pass sums the blocks of 256 tokens; then the token is found among the 256 of one
    block. Sums of sums are accurate in fp32. One running sum over 50k entries is so in float64; in
    fp32 it picks a wrong token in about 1 of 100 rows.
    """
    if top_k or top_p < 1 or min_p > 0:
        logits = filtered(logits / temperature, top_k, top_p, min_p) * temperature
    B, V = logits.shape
    top = logits.amax(-1, keepdim=True)
    mass = logits.new_zeros(B, -(-V // 256) * 256) if V % 256 else torch.empty_like(logits)
    torch.sub(logits, top, out=mass[:, :V])
    mass[:, :V].mul_(1 / temperature).exp_()
    blocks = mass.view(B, -1, 256)
    cdf = blocks.sum(-1).double().cumsum(-1)                                    # [B, V / 256]
    target = uniforms[:, None] * cdf[:, -1:]
    block = (cdf <= target).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 256))[:, 0].double().cumsum(-1)
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    tokens = (block * 256 + (inside <= rest).sum(-1, keepdim=True)).clamp(max=V - 1)
    logprobs = (logits.gather(1, tokens) - top) / temperature - cdf[:, -1:].log()
    return tokens[:, 0], logprobs[:, 0].float()


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """A copy of logits [B, V] with -inf for the tokens that a filter drops.

    top_k keeps the k best; top_p the smallest set of mass p (Holtzman et al., arXiv 1904.09751);
    min_p those of at least min_p times the best one's probability (arXiv 2407.01082).
    """
    logits = logits.clone()
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits[logits < kth] = -torch.inf
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        ordered[probs.cumsum(-1) - probs >= top_p] = -torch.inf
        logits = torch.empty_like(logits).scatter_(1, index, ordered)
    if min_p > 0:
        logits[logits < logits.amax(-1, keepdim=True) + math.log(min_p)] = -torch.inf
    return logits
