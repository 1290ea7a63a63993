"""Rows copied between layouts, each way with the backward that is fast and has a fixed order.

Autograd's own backward of an index would be an index_add: many times slower on a CPU, and in any
order on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Move(torch.autograd.Function):
    """Copies rows between the packed and the padded layout.

    The index is one-to-one, so the backward is a copy as well.
    """

    @staticmethod
    def forward(ctx, x, index, size, to_padded):
        ctx.index, ctx.size, ctx.to_padded = index, x.shape[0], to_padded
        if to_padded:
            return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        moved = Move.apply(grad.contiguous(), ctx.index, ctx.size, not ctx.to_padded)
        return moved, None, None, None


class Gather(torch.autograd.Function):
    """x[keys]: a row once for each that sees it. copies: `copies_of(keys, len(x))`.

    The backward sums the gradients of a row's copies in fp32 and in a fixed order. embedding_bag
    does so in one pass: it adds up lists of rows.
    """

    @staticmethod
    def forward(ctx, x, keys, copies):
        ctx.copies = copies
        return x.index_select(0, keys)

    @staticmethod
    def backward(ctx, grad):
        total = F.embedding_bag(ctx.copies[0], grad.flatten(1), ctx.copies[1], mode="sum")
        return total.view(-1, *grad.shape[1:]), None, None


def embed(weight: Tensor, ids: Tensor) -> Tensor:
    """weight[ids]. On a CPU torch sums the gradients of a token's copies in their dtype: in bf16
    half of them are lost after 1,000 copies."""
    if weight.device.type == "cpu" and weight.requires_grad and torch.is_grad_enabled():
        return Gather.apply(weight, ids, copies_of(ids, len(weight)))
    return F.embedding(ids, weight)


def copies_of(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each of `size` rows stands among x[keys]: (places, first place of each row)."""
    ordered, places = keys.sort(stable=True)
    return places, torch.searchsorted(ordered, torch.arange(size, device=keys.device))
