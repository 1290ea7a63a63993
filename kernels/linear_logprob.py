"""The log-prob of given tokens and the entropy beside them, straight from hidden states.

    z = hidden @ weight.T            logits, rounded to the input dtype as by a linear layer
    x = softcap(z) / temperature     fp32 from here on
    logprob = x[target] - logsumexp(x)
    entropy = logsumexp(x) - sum_j p_j x_j,    p = softmax(x)

Both outputs are differentiable in hidden and in weight. With incoming gradients g (log-prob) and
e (entropy):

    d x_j = g (1[j = target] - p_j) - e p_j (log p_j + entropy)

So the backward pass needs one number per token from the forward pass (logsumexp). It computes the
logits again. Only a part of the [N, V] logits is in memory at once: chunks in
torch_linear_logprob.py, tiles in triton_linear_logprob.py.

After "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv 2411.09009),
without its skipping of small gradients: ours are exact. Left out: label smoothing, ignored targets
(pass only the tokens that count), biases. `python benchmarks/logprob.py` measures what it saves.
"""

import torch
from torch import Tensor

from kernels.torch_linear_logprob import MEMORY_BUDGET, LinearLogprob


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
    softcap: float | None = None, memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) of softmax(hidden @ weight.T / temperature) at targets, in nats.

    hidden [N, H] and weight [V, H] share one floating dtype; targets [N] are integers in [0, V).
    Outputs are fp32 (float64 for float64 inputs). softcap c applies c tanh(z / c) before the
    temperature. The torch path holds about `memory_budget` bytes of logits at once. Raises
    ValueError on shapes, dtypes, temperature or (on a CPU) targets that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("hidden [N, H] and weight [V, H] expected, "
                         f"got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets: {hidden.shape[0]} integers expected, "
                         f"got {targets.dtype} {list(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError("hidden and weight must share a floating dtype, "
                         f"got {hidden.dtype} and {weight.dtype}")
    if not temperature > 0 or (softcap is not None and not softcap > 0):
        raise ValueError("temperature and softcap must be positive, "
                         f"got {temperature} and {softcap}")
    # On a GPU this check would wait for the device; there the kernel gives NaN for such a target.
    if not targets.is_cuda and len(targets):
        least, most = targets.min(), targets.max()
        if least < 0 or most >= len(weight):
            raise ValueError(f"targets must lie in [0, {len(weight)}), got {least}..{most}")
    if hidden.is_cuda and uses_triton(hidden):
        from kernels.triton_linear_logprob import triton_linear_logprob  # a CPU needs no triton

        return triton_linear_logprob(hidden, weight, targets, temperature, softcap)
    return LinearLogprob.apply(hidden, weight, targets, temperature, softcap, memory_budget)


def uses_triton(hidden: Tensor) -> bool:
    """Not for float64, nor on GPUs before the A100: Triton multiplies there without tensor cores
    and spills registers."""
    return hidden.dtype != torch.float64 and torch.cuda.get_device_capability(hidden.device)[0] >= 8
