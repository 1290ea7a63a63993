"""The log-prob and entropy of linear_logprob.py in plain torch, a chunk of the logits at a time.

Forward: tokens in chunks, whole rows of logits. So the softmax sums run in the order of
torch.logsumexp over a full row, and log-probs equal, bit for bit, those of a sampler that computes
them so. Logits that fit the memory budget whole are kept for the backward pass.

Backward: the vocabulary in chunks, all tokens at once. So a row of d weight is one matmul, summed
in fp32 inside and rounded once, and no fp32 copy of the [V, H] gradient is needed.

Elementwise work walks blocks that fit the cache. In bf16 the matmuls' results are rounded to bf16
(torch has no bf16 matmul with fp32 results on CPUs), as in the model's own linear layers.
Everything between the logits and d logits is fp32.
"""

import torch

MEMORY_BUDGET = 160 * 2**20  # bytes of logits at once: whole for 1,700 bf16 tokens of 49,152 words
CACHE_BLOCK = 2**21          # elements of one block: 8 MB in fp32, within the last-level cache


class LinearLogprob(torch.autograd.Function):
    """(hidden, weight, targets, temperature, softcap, memory_budget) -> (logprobs, entropy)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, memory_budget):
        (n_tokens, _), vocab = hidden.shape, weight.shape[0]
        rows = max(1, memory_budget // (vocab * hidden.element_size()))
        buffer = hidden.new_empty(min(rows, n_tokens), vocab)  # one for all: fresh pages cost time
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        stats = hidden.new_empty(3, n_tokens, dtype=accurate)
        for start in range(0, n_tokens, rows):
            chunk = slice(start, min(start + rows, n_tokens))
            logits = torch.mm(hidden[chunk], weight.t(), out=buffer[:chunk.stop - start])
            row_statistics(logits, targets[chunk], temperature, softcap, stats[:, chunk])
        logprobs, entropy, logsumexp = stats.unbind()
        kept = buffer if n_tokens <= rows else None
        ctx.save_for_backward(hidden, weight, targets, logprobs, entropy, logsumexp, kept)
        ctx.settings = temperature, softcap, memory_budget
        ctx.set_materialize_grads(False)                # an output that is not used has None
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        """d hidden [N, H] and d weight [V, H], in their dtypes, and four None; None where not
        needed (ctx.needs_input_grad).

        The incoming gradients [N] are None for an output that was not used. With d x of
        linear_logprob.py's header, and z the logits, x = softcap tanh(z / softcap) / temperature:
            d z_j = d x_j / temperature, times 1 - tanh(z_j / softcap)^2 with a softcap
            d hidden = d z @ weight,  d weight = d z^T @ hidden
        forward saved hidden, weight, targets, logprobs, entropy, logsumexp (of x), and the logits,
        or None where they did not fit. d hidden is summed over chunks in fp32. d z, in
        hidden's dtype, comes from `row_coefficients`, `logit_gradient` and, cast to that dtype,
        `target_gradient` below.
        """
        hidden, weight, targets, logprobs, entropy, logsumexp, logits = ctx.saved_tensors
        temperature, softcap, memory_budget = ctx.settings
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        (n_tokens, _), vocab = hidden.shape, weight.shape[0]
        columns = max(64, memory_budget // (2 * max(1, n_tokens) * hidden.element_size()))
        columns = min(vocab, columns)
        slope, curve = row_coefficients(grad_logprobs, grad_entropy, entropy, temperature)
        at_target = target_gradient(
            grad_logprobs, slope, curve, logprobs, logsumexp, temperature, softcap)
        grad_hidden = torch.zeros_like(hidden, dtype=logprobs.dtype) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        buffer = hidden.new_empty(n_tokens * columns)
        for start in range(0, vocab, columns):
            chunk = slice(start, min(start + columns, vocab))
            grad = buffer[:n_tokens * (chunk.stop - start)].view(n_tokens, chunk.stop - start)
            if logits is None:
                raw = torch.mm(hidden, weight[chunk].t(), out=grad)
            else:
                raw = logits[:, chunk]
            logit_gradient(raw, logsumexp, slope, curve, temperature, softcap, out=grad)
            inside = ((targets >= start) & (targets < chunk.stop)).nonzero()[:, 0]
            grad[inside, targets[inside] - start] = at_target[inside].to(grad.dtype)
            if needs_hidden:
                grad_hidden += grad @ weight[chunk]
            if needs_weight:
                torch.mm(grad.t(), hidden, out=grad_weight[chunk])
        if needs_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def row_statistics(logits, targets, temperature, softcap, out):
    """Fills out [3, n] with log-prob, entropy and logsumexp of each row of raw logits [n, V]."""
    for rows in row_blocks(*logits.shape):
        x = scaled(logits[rows], temperature, softcap, out.dtype)
        target = x.gather(1, targets[rows, None].long())[:, 0]
        largest = x.amax(1)
        exp = x.sub_(largest[:, None]).exp()
        total = exp.sum(1)
        logsumexp = total.log() + largest  # as torch.logsumexp computes it, in that order
        out[0, rows] = target - logsumexp
        out[1, rows] = total.log() - torch.linalg.vecdot(exp, x) / total
        out[2, rows] = logsumexp


def row_coefficients(grad_logprobs, grad_entropy, entropy, temperature):
    """slope, curve [N, 1], so that d z_j = p_j (slope + curve log p_j) off the target.

    curve is None without an entropy gradient. A GPU is not asked whether that gradient is zero: the
    answer would have to be waited for.
    """
    slope = torch.zeros_like(entropy) if grad_logprobs is None else -grad_logprobs / temperature
    if grad_entropy is None or not (grad_entropy.is_cuda or grad_entropy.any()):
        return slope[:, None], None
    curve = -grad_entropy / temperature
    return (slope + curve * entropy)[:, None], curve[:, None]


def target_gradient(grad_logprobs, slope, curve, logprobs, logsumexp, temperature, softcap):
    """d z at the target, [N], from the saved log-prob: exact where p is near 1.

    A p that was rounded to bf16 would not be.
    """
    p, slope = logprobs.exp(), slope[:, 0]
    grad = p * slope if curve is None else p * (slope + curve[:, 0] * logprobs)
    if grad_logprobs is not None:
        grad = grad + grad_logprobs / temperature
    if softcap is None:
        return grad
    return grad * (1 - ((logprobs + logsumexp) * temperature / softcap).square())


def logit_gradient(logits, logsumexp, slope, curve, temperature, softcap, out):
    """Writes d z = p (slope + curve log p) for raw logits [N, columns] to out, which may be logits
    itself."""
    for rows in row_blocks(*logits.shape):
        log_p = scaled(logits[rows], temperature, softcap, slope.dtype)
        bend = None if softcap is None else 1 - (log_p * (temperature / softcap)).square_()
        log_p.sub_(logsumexp[rows, None])
        if curve is None:
            grad = log_p.exp_().mul_(slope[rows])
        else:
            grad = log_p.exp().mul_(log_p.mul_(curve[rows]).add_(slope[rows]))
        out[rows] = grad if bend is None else grad.mul_(bend)


def scaled(logits, temperature, softcap, dtype):
    """A new tensor with softcap(logits) / temperature."""
    x = logits.to(dtype, copy=True)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x if temperature == 1 else x.div_(temperature)


def row_blocks(rows, columns):
    """Slices of nearly equal length that cover the rows, each about CACHE_BLOCK elements.

    Nearly equal, because torch sums a single long row in another order than the rows of a matrix.
    """
    count = max(1, -(-rows * columns // CACHE_BLOCK))
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
