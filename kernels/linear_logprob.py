"""Log-probabilities of given tokens straight from hidden states: of the [N, V] logits never more than a budget at once.

    z = hidden @ weight.T            raw logits, rounded to the input dtype as a plain linear layer rounds them
    x = softcap(z) / temperature     fp32 from here on
    logprob = x[target] - logsumexp(x)
    entropy = logsumexp(x) - sum_j p_j x_j,    p = softmax(x)

Both outputs are differentiable in hidden and in weight. With incoming gradients g (log-prob) and e (entropy):

    d x_j = g (1[j = target] - p_j) - e p_j (log p_j + entropy)

so the backward pass needs, of the forward pass, one number per token (logsumexp), and computes the logits again.

Forward, in torch: tokens in chunks, whole rows, so that the softmax sums run in the order of torch.logsumexp over a
full row, and log-probs have the very bits of a sampler that computes them so. Backward: vocabulary in chunks, all
tokens at once, so that a row of d weight is one matmul, summed in fp32 inside and rounded once: no fp32 copy of the
[V, H] gradient. Elementwise work walks blocks that fit the cache. Logits that fit the memory budget whole are
kept, not computed again.

In bf16 the matmuls' results are rounded to bf16 (torch has no bf16 matmul with fp32 results on CPUs), as in the
model's own linear layers; everything between the logits and d logits is fp32.

After "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv 2411.09009), without its
skipping of small gradients: ours are exact. Left out: label smoothing, ignored targets (pass only the tokens that
count), biases. `python kernels/linear_logprob.py` shows what it saves.
"""

import resource
import time

import torch

MEMORY_BUDGET = 160 * 2**20  # bytes of logits at once: 1,700 tokens of a 49,152-word vocabulary fit whole in bf16
CACHE_BLOCK = 2**21          # elements of one elementwise block: 8 MB in fp32, within the last-level cache


def linear_logprob(hidden, weight, targets, temperature=1.0, softcap=None, memory_budget=MEMORY_BUDGET):
    """(logprobs [N], entropy [N]) of softmax(hidden @ weight.T / temperature) at targets, both in nats.

    hidden [N, H] and weight [V, H] share one floating dtype; targets [N] are integers in [0, V). Outputs are fp32
    (float64 for float64 inputs). softcap c applies c tanh(z / c) before the temperature. CUDA tensors go to the Triton
    kernels (see `_uses_triton`), all others to chunked torch with about memory_budget bytes of logits at a time. If
    nothing requires grad, only the forward pass is done. Raises ValueError on shapes, dtypes, temperature or (on CPU)
    targets that do not fit.
    """
    _check(hidden, weight, targets, temperature, softcap)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if hidden.is_cuda and _uses_triton(hidden):
        from kernels.triton_linear_logprob import triton_linear_logprob  # here, so that CPUs need no triton
        return triton_linear_logprob(hidden, weight, targets, temperature, softcap)
    if needs_grad:
        return _LinearLogprob.apply(hidden, weight, targets, temperature, softcap, memory_budget)
    return _forward(hidden, weight, targets, temperature, softcap, memory_budget)[:2]


def _uses_triton(hidden):
    """Not for float64, nor on GPUs before the A100: Triton multiplies there without tensor cores, and spills."""
    return hidden.dtype != torch.float64 and torch.cuda.get_device_capability(hidden.device)[0] >= 8


def _check(hidden, weight, targets, temperature, softcap):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] expected, got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets: {hidden.shape[0]} integers expected, got {targets.dtype} {list(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    if not temperature > 0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"temperature and softcap must be positive, got {temperature} and {softcap}")
    # On a GPU the check would wait for the device; there the kernel answers NaN for such a target.
    if not targets.is_cuda and len(targets) and not 0 <= targets.min() <= targets.max() < weight.shape[0]:
        raise ValueError(f"targets must lie in [0, {weight.shape[0]}), got {targets.min()}..{targets.max()}")


# ----------------------------------------------------------------------------------------------------------------------
# torch

class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, memory_budget):
        logprobs, entropy, logsumexp, logits = _forward(
            hidden, weight, targets, temperature, softcap, memory_budget, keep_logits=True)
        ctx.save_for_backward(hidden, weight, targets, logprobs, entropy, logsumexp, logits)
        ctx.settings = temperature, softcap, memory_budget
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        grads = _backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, *ctx.needs_input_grad[:2])
        return *grads, None, None, None, None


def _forward(hidden, weight, targets, temperature, softcap, memory_budget, keep_logits=False):
    """logprobs, entropy, logsumexp, each [N], and the raw logits [N, V] if wanted and within the budget, else None."""
    (n_tokens, _), vocab = hidden.shape, weight.shape[0]
    rows = max(1, memory_budget // (vocab * hidden.element_size()))
    keep_logits = keep_logits and n_tokens <= rows
    buffer = hidden.new_empty(min(rows, n_tokens), vocab)  # one for all chunks: fresh pages cost time
    stats = hidden.new_empty(3, n_tokens, dtype=_accurate(hidden.dtype))
    for start in range(0, n_tokens, rows):
        chunk = slice(start, min(start + rows, n_tokens))
        logits = torch.mm(hidden[chunk], weight.t(), out=buffer[:chunk.stop - start])
        _row_statistics(logits, targets[chunk], temperature, softcap, stats[:, chunk])
    return *stats.unbind(), buffer if keep_logits else None


def _row_statistics(logits, targets, temperature, softcap, out):
    """Fills out [3, n] with log-prob, entropy and logsumexp of each row of raw logits [n, V], block by block."""
    for rows in _row_blocks(*logits.shape):
        x = _scaled(logits[rows], temperature, softcap, out.dtype)
        target = x.gather(1, targets[rows, None].long())[:, 0]
        largest = x.amax(1)
        exp = x.sub_(largest[:, None]).exp()
        total = exp.sum(1)
        logsumexp = total.log() + largest  # as torch.logsumexp computes it, in that order
        out[0, rows] = target - logsumexp
        out[1, rows] = total.log() - torch.linalg.vecdot(exp, x) / total
        out[2, rows] = logsumexp


def _backward(grad_logprobs, grad_entropy, hidden, weight, targets, logprobs, entropy, logsumexp, logits,
              temperature, softcap, memory_budget, needs_hidden, needs_weight):
    """(d hidden, d weight), each None unless needed. logits: the raw ones if the forward pass kept them, or None."""
    (n_tokens, _), vocab = hidden.shape, weight.shape[0]
    columns = min(vocab, max(64, memory_budget // (2 * max(1, n_tokens) * hidden.element_size())))
    slope, curve = row_coefficients(grad_logprobs, grad_entropy, entropy, temperature)
    at_target = _target_gradient(grad_logprobs, slope, curve, logprobs, logsumexp, temperature, softcap)
    grad_hidden = torch.zeros_like(hidden, dtype=_accurate(hidden.dtype)) if needs_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    buffer = hidden.new_empty(n_tokens * columns)
    for start in range(0, vocab, columns):
        chunk = slice(start, min(start + columns, vocab))
        grad = buffer[:n_tokens * (chunk.stop - start)].view(n_tokens, chunk.stop - start)
        raw = torch.mm(hidden, weight[chunk].t(), out=grad) if logits is None else logits[:, chunk]
        _logit_gradient(raw, logsumexp, slope, curve, temperature, softcap, out=grad)
        inside = ((targets >= start) & (targets < chunk.stop)).nonzero()[:, 0]
        grad[inside, targets[inside] - start] = at_target[inside].to(grad.dtype)
        if needs_hidden:
            grad_hidden += grad @ weight[chunk]
        if needs_weight:
            torch.mm(grad.t(), hidden, out=grad_weight[chunk])
    return grad_hidden.to(hidden.dtype) if needs_hidden else None, grad_weight


def row_coefficients(grad_logprobs, grad_entropy, entropy, temperature):
    """slope, curve [N, 1]: d z_j = p_j (slope + curve log p_j) off the target; curve None without entropy gradient."""
    slope = torch.zeros_like(entropy) if grad_logprobs is None else -grad_logprobs / temperature
    # a GPU is not asked whether the gradient is zero: the answer would have to be waited for
    if grad_entropy is None or not (grad_entropy.is_cuda or grad_entropy.any()):
        return slope[:, None], None
    curve = -grad_entropy / temperature
    return (slope + curve * entropy)[:, None], curve[:, None]


def _target_gradient(grad_logprobs, slope, curve, logprobs, logsumexp, temperature, softcap):
    """d z at the target, [N], from the saved log-prob: exact where p is near 1, as p rounded to bf16 would not be."""
    p, slope = logprobs.exp(), slope[:, 0]
    grad = p * slope if curve is None else p * (slope + curve[:, 0] * logprobs)
    if grad_logprobs is not None:
        grad = grad + grad_logprobs / temperature
    return grad if softcap is None else grad * (1 - ((logprobs + logsumexp) * temperature / softcap).square())


def _logit_gradient(logits, logsumexp, slope, curve, temperature, softcap, out):
    """Writes d z = p (slope + curve log p) for raw logits [N, columns] to out, which may be logits itself."""
    for rows in _row_blocks(*logits.shape):
        log_p = _scaled(logits[rows], temperature, softcap, slope.dtype)
        bend = None if softcap is None else 1 - (log_p * (temperature / softcap)).square_()
        log_p.sub_(logsumexp[rows, None])
        if curve is None:
            grad = log_p.exp_().mul_(slope[rows])
        else:
            grad = log_p.exp().mul_(log_p.mul_(curve[rows]).add_(slope[rows]))
        out[rows] = grad if bend is None else grad.mul_(bend)


def _scaled(logits, temperature, softcap, dtype):
    """A new tensor with softcap(logits) / temperature."""
    x = logits.to(dtype, copy=True)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x if temperature == 1 else x.div_(temperature)


def _row_blocks(rows, columns):
    """Slices of nearly equal length that cover the rows, each about CACHE_BLOCK elements.

    Nearly equal, because torch sums a single long row in another order than the rows of a matrix.
    """
    count = max(1, -(-rows * columns // CACHE_BLOCK))
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def _accurate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------------------------

def main():
    """A small lesson: what the logits cost, and what is left of it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 256, requires_grad=True), (torch.randn(49152, 256) / 8).requires_grad_()
    targets = torch.randint(49152, (1024,))

    def plain():
        log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)

    def fused():
        return linear_logprob(hidden, weight, targets, memory_budget=2**25)

    print(f"1,024 tokens, 49,152 words, fp32: the logits are {1024 * 49152 * 4 / 1e6:.0f} MB")
    torch.autograd.grad(sum(out.sum() for out in linear_logprob(hidden[:2], weight, targets[:2])), weight)  # warm up
    start_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, function in (("fused", fused), ("log_softmax", plain)):  # the lean one first: the peak can only rise
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            logprobs, entropy = function()
            gradients = torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
            seconds.append(time.perf_counter() - start)
            del logprobs, entropy, gradients
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kb) / 1e3
        print(f"{name:12} {min(seconds):6.2f} s forward and backward, {extra:6.0f} MB above the inputs")


if __name__ == "__main__":
    main()
