"""Fused kernels. Today one: the log-prob and entropy of given tokens without the [tokens, vocabulary] logits."""

from kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
