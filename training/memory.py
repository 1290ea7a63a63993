"""How much memory a run takes: an estimate by part, and micro-batches sized to fit (`--memory`)."""

import sys
from collections import defaultdict

import torch
from torch import Tensor

import personas
from model import Transformer, pack
from sampling.cache import row_bytes, slots_for
from training.policy import Policy, ranks


def plan(policy: Policy, job) -> None:
    """Sizes `--micro-tokens` so that the peak stays within `--memory` GB, and prints it by part.

    job: a training.run.Job. Raises ValueError where even one completion or the sampler's cache does
    not fit.
    """
    args, limit = job.args, job.args.memory * 1e9
    persona = max(job.pool, key=lambda p: len(p.text), default=None) if args.persona_prob else None
    question = max(job.problems, key=lambda p: len(p.question)).question
    prompt = len(personas.prompt_ids(job.tokenizer, question, persona))
    completions = args.group_size if personas.shares_prompt(args.mix) else 1
    longest = prompt + args.max_new_tokens
    per_token = activation_bytes(policy.model, prompt, completions, args.max_new_tokens)

    least = estimate(policy, job, longest * per_token, longest)
    if least["peak"] > limit:
        raise ValueError(f"--memory {args.memory:.4g} is too little: about "
                         f"{least['peak'] / 1e9:.2f} GB are needed; try --recompute, a smaller "
                         "--group-size, --max-new-tokens or --slots, or more ranks")
    beside = estimate(policy, job, limit, longest)["peak"] - limit
    args.micro_tokens = int((limit - beside) / per_token)
    parts = estimate(policy, job, args.micro_tokens * per_token, longest)
    if ranks()[0] == 0:
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        print(f"memory, estimated GB: {told}", file=sys.stderr)


def estimate(policy: Policy, job, activations: float, row_tokens: int) -> dict[str, float]:
    """Estimated bytes by part on this rank, and their `peak`.

    Sampling and training take turns, so the peak counts the larger of the two, beside what is
    always there, the sampler's cache too. With `--overlap` they happen at once, and there are two
    samplers.
    activations: bytes kept for a backward. row_tokens: the longest row of the sampler's cache.
    """
    args, model = job.args, policy.model
    count, size = sum(p.numel() for p in policy.parameters), model.dtype.itemsize
    whole = {p: p.nbytes for p in model.parameters()}
    on_cpu, kept = model.device.type == "cpu", defaultdict(int)
    for state in policy.optimizer.state:
        for name, x in state.items():
            kept["moments" if name.startswith("exp_avg") else "masters"] += x.nbytes
    slots = args.slots or slots_for(model, row_tokens)
    rows = min(slots, args.prompts // ranks()[1] * args.group_size)
    widest = max(p.numel() for p in policy.parameters)
    parts = {"weights": sum(whole.values()), **kept,
             "gradients": count * 4 + widest * size,    # their sum, and one of a micro-batch's
             "activations": activations,
             "cache": rows * row_bytes(model, row_tokens) * (1 + args.overlap)}
    if args.async_save and on_cpu:
        parts["checkpoint"] = kept["moments"] + kept["masters"] + count * size
    if args.overlap:
        parts["copy"] = count * size
    others = {m for m in (job.reference, job.author) if m is not None and m is not model}
    if others:
        parts["others"] = sum(p.nbytes for m in others for p in m.parameters() if p not in whole)
    parts["logits"] = rows * model.c.vocab_size * (size + 8)    # also in fp32, and their exp
    sampling = parts["logits"] + on_cpu * parts["weights"]      # rearranged, for the CPU's matmuls
    training = parts["gradients"] + parts["activations"]
    held = ("weights", "masters", "moments", "cache", "checkpoint", "copy", "others")
    always = sum(parts.get(name, 0) for name in held)
    together = sampling + training if args.overlap else max(sampling, training)
    return parts | {"peak": always + together}


def activation_bytes(model: Transformer, prompt: int, completions: int, new_tokens: int) -> float:
    """Bytes a packed token keeps for the backward, counted on a forward of one such group.

    Each storage counts once. The group has the run's own shape, because attention may keep its
    scores, whose number grows with the square of the length.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, kept = {}, []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)                                  # alive, or the next one gets its address
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    packed = pack([([0] * prompt, [[0] * new_tokens] * completions)], model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(packed.input_ids, packed.position_ids, packed.attend)
    total = sum(size for at, size in saved.items() if at not in parameters)
    return total / len(packed.input_ids)
