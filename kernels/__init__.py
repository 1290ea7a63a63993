"""Fused operations, each with its definition in plain torch: attention over a shared prompt, in
training and decoding; log-prob and entropy of given tokens; norms, rotation, gates; gated
DeltaNets; AdamW. README.md beside this file says what each computes.

They import torch, and Triton where there is a GPU for it. Of our own code they need only the folder
that compiled C++ is cached in.
"""

from kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
