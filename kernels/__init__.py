"""Fused kernels: attention over a shared prompt; the log-prob and entropy of given tokens.

They import only torch, and Triton where there is a GPU for it.
"""

from kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
