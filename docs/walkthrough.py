"""Writes docs/walkthrough.md: one training step of train.py on the embedded model, with the numbers it really had.

    python docs/walkthrough.py

The step is train.py's own: `roll_outs`, then `learn`. What passes through the functions in between is recorded, and
every quoted line of code is searched in its function's source, so the page cannot say what the code does not do.
Left out: timing, and the branches that the main job does not take (KL, correction, several epochs).
"""

import copy
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import grpo  # noqa: E402
import model as decoder  # noqa: E402
import personas  # noqa: E402
import rewards  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402
from kernels.torch_linear_logprob import row_statistics  # noqa: E402
from sampling import draw  # noqa: E402
from training import policy  # noqa: E402
from training.settings import settings  # noqa: E402

FLAGS = "--prompts 2 --group-size 4 --max-new-tokens 24 --persona-prob 0.5 --warmup 1 --dtype float32 --seed 10"
NAME, ENTRY = "norm.weight", 0                          # the weight to watch: it takes part in every token's logits


def step(model, tokenizer) -> SimpleNamespace:
    """One step on `model` (changed by it), as train.py does it, with what passed through its functions."""
    args, calls = settings(FLAGS.split()), {}
    problems, pool = tasks.load(args.task, "train", args.seed), personas.load(args.personas)
    behind = policy.Policy(model, args.learning_rate, args.warmup)
    before = model.state_dict()[NAME][ENTRY].item()

    def recorded(module, name):
        function = getattr(module, name)

        def call(*given, **named):
            result = function(*given, **named)
            calls.setdefault(name, SimpleNamespace(given=given, named=named, result=result))
            return result
        return patch.object(module, name, call)

    with rewards.Verifier() as verifier:
        batch = train.roll_outs(model, tokenizer, problems, pool, train.make_grader(args.reward, verifier), args, 0)
    raw = batch.rewards
    with recorded(grpo, "truncation"), recorded(grpo, "group_advantages"), recorded(train, "pack"), \
            recorded(train, "completion_logprobs"), recorded(grpo, "token_weights"), recorded(grpo, "policy_loss"):
        metrics = train.learn(behind, None, batch, None, 0, args)
    packed = calls["pack"].result
    with torch.no_grad():
        after, _ = decoder.completion_logprobs(model, packed, args.temperature)
    return SimpleNamespace(args=args, batch=batch, raw=raw, metrics=metrics, packed=packed, after=after, policy=behind,
                           before=before, tokenizer=tokenizer, model=model, calls=calls)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of the page


def code(function, *parts: str) -> str:
    """The lines of `function` in which `parts` stand, quoted from its source."""
    function = inspect.unwrap(function)
    lines = inspect.getsource(function).splitlines()
    found = [next(line for line in lines if part in line) for part in parts]    # StopIteration: the code has changed
    name = f"{Path(inspect.getsourcefile(function)).relative_to(ROOT)}, {function.__qualname__}"
    return "```python\n" + f"# {name}\n" + textwrap.dedent("\n".join(found)) + "\n```"


def block(lines) -> str:
    return "\n".join(["```text", *lines, "```"])


def rounded(x: torch.Tensor, digits: int = 4) -> str:
    return "[" + ", ".join(f"{v:+.{digits}f}" if v else "0" for v in x.tolist()) + "]"


def prompts(s) -> str:
    """Problems, personas, prompts."""
    out = ["## 1. The problem", code(train.roll_outs, "chosen = "),
           block(f"{p.id}: {p.question}  gold: {p.answer}" for p in s.batch.problems), "## 2. The persona",
           f"With probability rho = {s.args.persona_prob} a training persona speaks in the system prompt. The scheme "
           "is ours: the paper's abstract names none. All completions of a problem share it, so a persona is never "
           "compared with another inside a group.",
           "![rows of completions coloured by persona: none for RLVR, one a row, one a cell](permix.svg)",
           code(train.roll_outs, "drawn = "), code(personas.draw, "if rng", "return None", "return per"),
           block(f"problem {i}: {row[0].name + ': ' + row[0].text if row[0] else 'no persona'}"
                 for i, row in enumerate(s.batch.personas))]
    out += ["## 3. The prompt", "The chat template gives token ids, which nobody encodes again. Where there is no "
            "persona, the template's own default stands between `<|im_start|>system` and `<|im_end|>`.",
            code(personas.chat_ids, "apply_chat_template")]
    for i, (ids, _) in enumerate(s.batch.groups):
        out.append(block([f"problem {i}, {len(ids)} ids: {ids[:8]} ... {ids[-4:]}", s.tokenizer.decode(ids)]))
    return "\n\n".join(out)


def samples(s) -> str:
    """Completions, verdicts, advantages."""
    G = s.args.group_size
    out = ["## 4. The completions", "$$y_t \\sim \\pi(\\cdot \\mid x, y_{<t}), \\qquad \\pi = "
           f"\\mathrm{{softmax}}(z / T), \\quad T = {s.args.temperature}$$",
           "z are the logits. The sampler keeps each token's log-prob at the temperature it sampled with. The prompt "
           "is computed once; its completions share it as their prefix.",
           "![a prefix of prompt tokens with four completions](tree.svg)",
           code(train.roll_out, "params = Sampling", "seed=args.seed +", "samples = generate"),
           code(draw.sample_rows, "logprobs = (logits"),
           "Problem and sample, length, how it ended, text:",
           block(f"{c.index}.{c.sample} {len(c.tokens):2} tokens {'cut off' if c.truncated else 'ended  '} "
                 f"{json.dumps(text)}" for c, text in zip(s.batch.completions, s.batch.texts, strict=True)),
           "The last one, token by token:",
           block(f"{token:6} {json.dumps(s.tokenizer.decode([token])):16} {value:8.4f}" for token, value in
                 zip(s.batch.completions[-1].tokens, s.batch.completions[-1].logprobs, strict=True))]
    judged = [rewards.verify(s.batch.problems[i // G].answer, text) for i, text in enumerate(s.batch.texts)]
    out += ["## 5. The verdicts", "Each is judged while others still decode. The rule says where the answer was "
            "found, and what settled it: equal text, two numbers compared, or no mathematics in it.",
            code(train.make_grader, "verifier.submit", "return lambda: (float(future"),
            block(f"{i // G}.{i % G} {verdict:12} {v.extracted!r}, {v.rule}"
                  for i, (verdict, v) in enumerate(zip(s.batch.verdicts, judged, strict=True))),
            "A completion cut off at the limit earns nothing (`--truncated zero`), whatever its text says:",
            code(grpo.truncation, "masked_fill(truncated"),
            block([f"rewards   {s.raw.tolist()}", f"and after {s.calls['truncation'].result[0].tolist()}"])]
    out += ["## 6. The advantages", "$$A_i = r_i - \\frac{1}{G} \\sum_{j=1}^{G} r_j$$",
            "GRPO's baseline (arXiv 2402.03300) without its division by the standard deviation (Dr. GRPO, arXiv "
            "2503.20783). A group whose rewards are all equal gets exactly 0 and is left out of the forward.",
            code(grpo.group_advantages, "centred = rewards"), code(train.learn, "useful = ", "if args.kl_coef or"),
            block(f"problem {i}: A = {rounded(row, 2)}" for i, row in enumerate(s.calls["group_advantages"].result))]
    return "\n\n".join(out)


def forward(s) -> str:
    """Packing, log-probs, entropy."""
    p, (_, logprobs, old, *_) = s.packed, s.calls["policy_loss"].given
    entropy = s.calls["completion_logprobs"].result[1]
    sampled = torch.tensor([x for c in s.batch.completions[-len(p.lengths):] for x in c.logprobs])
    B, n, P, C = p.attend.shape
    out = ["## 7. The pack", "Every token stands once in a row without padding: prefixes (the prompts), then "
           "completions. A completion continues its prefix's positions. Its last token is a target only, so it is not "
           "in the row.",
           "![the packed row, and a mask of what attends to what](packing.svg)",
           code(decoder.pack, "inputs = "), code(decoder.pack, "hidden_index +="),
           block([f"groups {B}, completions {n}, prefix {P}, longest completion in the row {C}",
                  f"input_ids {list(p.input_ids.shape)} = {P} + {' + '.join(str(x - 1) for x in p.lengths)}",
                  f"position_ids 0 .. {P - 1}, then {P} .. {P + p.lengths[0] - 2} and so on, once a completion",
                  f"targets {list(p.targets.shape)} = {' + '.join(map(str, p.lengths))}, read at hidden_index "
                  f"{p.hidden_index[:3].tolist()} ..."])]
    out += ["## 8. Log-probs and entropy", "$$\\log \\pi(y_t) = \\frac{z_{y_t}}{T} - \\log \\sum_v e^{z_v / T}, "
            "\\qquad H_t = -\\sum_v \\pi_v \\log \\pi_v$$",
            code(decoder.completion_logprobs, "hidden = model", "return linear"),
            code(row_statistics, "logsumexp = ", "out[0, rows] = ", "out[1, rows] = "),
            "Sampler and trainer run the same weights at the same temperature, so their log-probs agree up to "
            "rounding. $\\pi_{old}$ in the loss is not the sampler's number but the trainer's own before the batch's "
            "first optimizer step. So the ratio is exactly 1 here, and moves only with `--inner-epochs 2`:",
            block([f"first three: sampler {rounded(sampled[:3])}, trainer {rounded(logprobs[:3])}",
                   f"max |trainer - sampler| = {(logprobs - sampled).abs().max():.6f}",
                   f"ratio from {(logprobs - old).exp().min():.6f} to {(logprobs - old).exp().max():.6f}",
                   f"mean entropy {entropy.mean():.4f} nats"])]
    return "\n\n".join(out)


def learning(s) -> str:
    """Loss, clipping, AdamW, and what became of the completions."""
    call, lr = s.calls["policy_loss"], s.args.learning_rate
    _, logprobs, _, advantages, lengths, weight, *_ = call.given
    state = {key: values[NAME][ENTRY].item() for key, values in s.policy.state().items() if key != "steps"}
    m, v, norm = state["exp_avg"] / 0.1, state["exp_avg_sq"] / 0.05, s.metrics["grad_norm"]
    terms = " ".join(f"{a:+.2f} * {n}" for a, n in zip(advantages, lengths, strict=True))
    out = ["## 9. The loss", "$$L = -\\sum_t w_t \\min\\big(\\rho_t A,\\ \\mathrm{clip}(\\rho_t, 1 - \\epsilon, "
           "1 + \\epsilon) A\\big), \\qquad \\rho_t = \\frac{\\pi(y_t)}{\\pi_{old}(y_t)}, \\quad w_t = \\frac{1}{N}$$",
           "The ratio rho_t has nothing to do with the share rho of section 2. The clip is PPO's (arXiv 1707.06347), "
           "the weight DAPO's (arXiv 2503.14476): N counts the tokens of the whole batch, those of the group without "
           "variance too.", code(grpo.token_weights, "total_tokens) *"),
           code(grpo.policy_loss, "log_ratio = logprobs", "ratio = log_ratio.clamp", "loss = -(weights"),
           code(grpo.clipped_surrogate, "surrogate = torch.min"),
           block([f"N = {s.calls['token_weights'].named['total_tokens']}, w_t = {weight[0]:.6f}",
                  f"L = -{weight[0]:.6f} * ({terms}) = {call.result[0].item():+.6f}"]),
           "At ratio 1 the loss says little; its gradient is that of the log-probs, weighted by the advantages."]
    out += ["## 10. Gradient clipping", "$$g \\leftarrow g \\cdot \\min\\Big(1, \\frac{c}{\\lVert g \\rVert}\\Big)$$",
            code(policy.Policy.step, "clip_grad_norm_"),
            block([f"norm {norm:.4f}, c = {s.args.max_grad_norm}: times {min(1, s.args.max_grad_norm / norm):.4f}"])]
    out += ["## 11. AdamW on fp32 masters", "$$\\theta \\leftarrow \\theta - \\eta\\, \\frac{\\hat m}{\\sqrt{\\hat v} "
            "+ 10^{-8}}, \\qquad \\hat m = \\frac{m}{1 - \\beta_1^k}, \\quad \\hat v = \\frac{v}{1 - \\beta_2^k}$$",
            "(arXiv 1711.05101; no weight decay.) A bf16 model has fp32 masters behind it, refreshed into it after the "
            "step; in fp32, as here, they are the same tensors. In the first step every weight with a gradient moves "
            "by nearly the learning rate.", code(policy.Policy.__init__, "torch.optim.AdamW"),
            code(policy.Policy.step, "self.optimizer.step()", "self.refresh()"),
            block([f"{NAME}[{ENTRY}]: gradient {m:+.6f}, by the formula {-m / (v ** 0.5 + 1e-8):+.4f} learning rates",
                   f"{s.before:.6f} -> {state['masters']:.6f}, that is {(state['masters'] - s.before) / lr:+.2f} "
                   f"times {lr}"])]
    rows = zip(advantages, *(grpo.sequence_sum(x.detach(), lengths) for x in (logprobs, s.after)), strict=True)
    out += ["## 12. What has changed", "The log-prob of each whole completion of the group, before and after. So few "
            "completions at the full learning rate move the model far; the main job has 96 a step and warms up.",
            block(f"1.{i} A = {a:+.2f}: {x:9.4f} -> {y:9.4f}  ({y - x:+.4f})" for i, (a, x, y) in enumerate(rows))]
    return "\n\n".join(out)


def page(model, tokenizer) -> str:
    """The whole page; `model` (fp32) is left as it was."""
    s = step(copy.deepcopy(model), tokenizer)
    opening = ["# One training step, with real tensors", "Written by [walkthrough.py](walkthrough.py) from the run "
               f"`python train.py {FLAGS} --steps 1`, on SmolLM2-135M. A test regenerates it.",
               "![mix, prompts, roll out and verify, advantages, pack, log-probs, loss, masters, model](step.svg)"]
    return "\n\n".join([*opening, prompts(s), samples(s), forward(s), learning(s)]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "walkthrough.md").write_text(page(*weights.load(weights.EMBEDDED, "float32", "cpu")))
