"""How much memory a run takes: an estimate by part, and micro-batches sized to fit (`--memory`)."""

import os
import resource
from collections import defaultdict

import torch
from torch import Tensor

from common.command import note
from common.ranks import ranks
from model import Transformer, pack
from sampling.cache import row_bytes, slots_for
from training.policy import Policy


def plan(policy: Policy, job) -> None:
    """Sizes `--micro-tokens` so that the peak stays within `--memory` GB, and prints it by part.

    What the process holds differs a little each time, and another size rounds otherwise. So the
    size is rounded down to four binary places, by an eighth at most: the same command nearly always
    finds the same, and a resumed run keeps what was found.
    job: a training.run.Job. Raises ValueError where even one completion or the sampler's cache does
    not fit.
    """
    args, limit = job.args, job.args.memory * 1e9
    prompt, completions = job.longest_prompt, job.sampling.n        # that share a prompt
    new, longest = args.max_new_tokens, prompt + args.max_new_tokens

    # A further completion adds as much as the second: no larger group is tried.
    one = activation_bytes(policy.model, prompt, 1, new)
    more = activation_bytes(policy.model, prompt, 2, new) - one if completions > 1 else 0
    per_token = (one + (completions - 1) * more) / (prompt + completions * new)

    least = estimate(policy, job, one, longest)
    if least["peak"] > limit:
        raise ValueError(f"--memory {args.memory:.4g} is too little: about "
                         f"{least['peak'] / 1e9:.2f} GB are needed; try --recompute, a smaller "
                         "--group-size, --max-new-tokens or --slots, or more ranks")
    beside = estimate(policy, job, limit, longest)["peak"] - limit
    fit = int((limit - beside) / per_token)
    args.micro_tokens = fit - fit % 2 ** max(0, fit.bit_length() - 4)
    parts = estimate(policy, job, args.micro_tokens * per_token, longest)
    shares = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    note(f"memory, estimated GB: {shares}")


def estimate(policy: Policy, job, activations: float, row_tokens: int) -> dict[str, float]:
    """Estimated bytes by part on this rank, and their `peak`.

    Sampling and training take turns, so the peak counts the larger of the two, beside what is
    always there, the sampler's cache too. With `--overlap` they happen at once, and there are two
    samplers. The evaluation has a cache of its own, before training's and after it.
    activations: bytes kept for a backward. row_tokens: the longest row of the sampler's cache.
    """
    args, model = job.args, policy.model
    count, size = sum(p.numel() for p in policy.parameters), model.dtype.itemsize
    whole = {p: p.nbytes for p in model.parameters()}
    on_cpu, held = model.device.type == "cpu", defaultdict(int)
    held["weights"] = sum(whole.values())
    for state in policy.optimizer.state:
        for name, x in state.items():
            held["moments" if name.startswith("exp_avg") else "masters"] += x.nbytes
    others = {m for m in (job.reference, job.author) if m is not None and m is not model}
    if others:
        held["others"] = sum(p.nbytes for m in others for p in m.parameters() if p not in whole)
    held["process"] = outside_tensors(model.device, sum(held.values()))

    problems, speakers = job.held_out or ([], [])
    slots = args.slots or slots_for(model, row_tokens)
    rows = min(slots, args.prompts // ranks()[1] * args.group_size)
    asked = min(slots, -(-len(problems) * (1 + len(speakers)) // ranks()[1]))
    cache, logits = row_bytes(model, row_tokens), model.c.vocab_size * (size + 8)
    held["cache"] = rows * cache * (1 + args.overlap)
    if args.async_save and on_cpu:
        held["checkpoint"] = held["moments"] + held["masters"] + count * size
    if args.overlap:
        held["copy"] = count * size
    parts = {
        "gradients": count * 4 + max(p.numel() for p in policy.parameters) * size,  # and one more
        "activations": activations,
        "logits": rows * logits}                        # also in fp32, and their exp
    rearranged = on_cpu * held["weights"]               # for the CPU's matmuls, while it samples
    sampling = parts["logits"] + rearranged
    training = parts["gradients"] + parts["activations"]
    together = sampling + training if args.overlap else max(sampling, training)
    evaluation = asked * (cache + logits) + rearranged - held["cache"]
    return {**held, **parts, "peak": sum(held.values()) + max(together, evaluation)}


def outside_tensors(device: torch.device, tensors: int) -> int:
    """Bytes that this process takes beside its tensors: libraries, and a GPU's context with them.

    Of a GPU that other processes use too, theirs count.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as numbers:
            resident = int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:                                               # macOS: the peak so far, in bytes
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(0, resident - tensors)


def activation_bytes(model: Transformer, prompt: int, completions: int, new_tokens: int) -> int:
    """Bytes that a forward of one such group keeps for the backward, counted.

    Each storage counts once. The group has the run's own shape, because attention may keep its
    scores, whose number grows with the square of the length.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved, kept = {}, []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)                                  # alive, or the next one gets its address
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    packed = pack([([0] * prompt, [[0] * new_tokens] * completions)], model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        x = model(packed.input_ids, packed.position_ids, packed.attend)
        if model.checkpointing:                         # and what a layer keeps, computed again
            model.layers[0](x, x, model.rotary_tables(packed.position_ids)[0], packed.attend)
    return sum(size for at, size in saved.items() if at not in parameters)
