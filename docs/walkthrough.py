"""Writes docs/walkthrough.md and docs/walkthrough.ipynb: one training step of train.py, with the
numbers it really had.

    python docs/walkthrough.py

The model is the embedded one, and the step is train.py's own: `roll_out`, then `learn`. What passes
through the functions in between is recorded. Every quoted line of code is looked up in its
function's source, so the page cannot say what the code does not do.

Both files come from one list of texts and cells, `contents`. A cell is the body of a function
`show_...`. docs/notebook.py executes the cells once, and what they print stands in both files.
Left out: timing, and what the main job does not do (KL, correction, several steps on a batch).
"""

import inspect
import json
import sys
import textwrap
from contextlib import ExitStack
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
import train  # noqa: E402
import weights  # noqa: E402
from kernels.torch_linear_logprob import row_statistics  # noqa: E402
from rollout import Sampler  # noqa: E402
from sampling import draw  # noqa: E402
from training.adamw import AdamW  # noqa: E402
from training.minibatches import minibatches  # noqa: E402
from training.policy import Policy  # noqa: E402
from training.settings import settings  # noqa: E402

FLAGS = ("--prompts 2 --group-size 4 --max-new-tokens 24 --persona-prob 0.5 --warmup 1 "
         "--dtype float32 --seed 10")
NAME, ENTRY = "norm.weight", 0      # the weight to watch: it takes part in every token's logits


def step(model, tokenizer) -> SimpleNamespace:
    """One step of train.py on `model`, which it changes, and what passed through its functions."""
    args, calls = settings([*FLAGS.split(), "--eval-problems", "0"]), {}

    def recorded(module, name):
        function = getattr(module, name)

        def call(*given):
            result = function(*given)
            calls.setdefault(name, SimpleNamespace(given=given, result=result))
            return result
        return patch.object(module, name, call)

    with patch.object(weights, "load", lambda *_: (model, tokenizer)):
        job = train.read(args)
    policy, before = Policy(model, args.learning_rate, args.warmup), watched(model)
    with ExitStack() as stack:
        for name in ("truncation", "group_advantages", "token_weights", "policy_loss"):
            stack.enter_context(recorded(grpo, name))
        for name in ("pack", "completion_logprobs"):
            stack.enter_context(recorded(train, name))
        with job.rewarder:
            batch = train.roll_out(Sampler(model), job, 0)
        metrics = train.learn(policy, batch, job, 0)
    packed = calls["pack"].result
    with torch.no_grad():
        after, _ = decoder.completion_logprobs(model, packed, args.temperature)
    return SimpleNamespace(args=args, batch=batch, metrics=metrics, packed=packed, after=after,
                           policy=policy, before=before, tokenizer=tokenizer, calls=calls)


def watched(model) -> float:
    return model.state_dict()[NAME][ENTRY].item()


# --------------------------------------------------------------------------------------------------
# Pieces of both


def code(function, *parts: str) -> str:
    """The lines of `function` in which `parts` stand, quoted from its source.

    Neighbours keep their indentation to each other; other lines begin at the margin.
    """
    lines, runs, last = inspect.getsource(inspect.unwrap(function)).splitlines(), [], -2
    margin = ""
    for part in parts:
        number = next(i for i, line in enumerate(lines) if part in line)    # else: code has changed
        if number != last + 1 or not lines[number].startswith(margin):
            runs.append([])
            margin = lines[number][:-len(lines[number].lstrip())]
        runs[-1].append(lines[number])
        last = number
    file = Path(inspect.getsourcefile(inspect.unwrap(function))).relative_to(ROOT)
    quoted = "\n".join(textwrap.dedent("\n".join(run)) for run in runs)
    return f"```python\n# {file}, {function.__qualname__}\n{quoted}\n```"


def rounded(x: torch.Tensor, digits: int = 4) -> str:
    return "[" + ", ".join(f"{v:+.{digits}f}" if v else "0" for v in x.tolist()) + "]"


# --------------------------------------------------------------------------------------------------
# The step: texts, and the cells that print what stands between them (s: what `step` gives)


def show_problems(s):
    for p in s.batch.problems:
        print(f"{p.id}: {p.question}  gold: {p.answer}")


def show_personas(s):
    for i, row in enumerate(s.batch.personas):
        print(f"problem {i}:", f"{row[0].name}: {row[0].text}" if row[0] else "no persona")


def show_prompts(s):
    for i, (ids, _) in enumerate(s.batch.groups):
        print(f"problem {i}, {len(ids)} ids: {ids[:8]} ... {ids[-4:]}")
        print(s.tokenizer.decode(ids))


def prompts(args) -> list:
    """Problems, personas, prompts."""
    return [
        "## 1. The problem",
        code(train.roll_out, "problems = tasks.batch"),
        show_problems,
        "## 2. The persona",
        f"With probability rho = {args.persona_prob} a training persona speaks in the system "
        "prompt. The scheme is ours: the paper's abstract names none. All completions of a problem "
        "share it. So a persona is never compared with another inside a group.",
        "![rows of completions coloured by persona: none for RLVR, one a row, one a cell]"
        "(permix.svg)",
        code(train.roll_out, "speakers = personas.mix"),
        code(personas.draw, "if rng", "return None", "return personas["),
        show_personas,
        "## 3. The prompt",
        "The chat template gives token ids. They are never turned into text and encoded again. "
        "Where there is no persona, the template's own default stands between `<|im_start|>system` "
        "and `<|im_end|>`.",
        code(personas.chat_ids, "return tokenizer.apply_chat_template", "enable_thinking=False"),
        show_prompts]


def show_completions(s):
    for c, text in zip(s.batch.completions, s.batch.texts, strict=True):
        end = "cut off" if c.truncated else "ended  "
        print(f"{c.index}.{c.sample} {len(c.tokens):2} tokens {end} {json.dumps(text)}")


def show_tokens(s):
    last = s.batch.completions[-1]
    for token, value in zip(last.tokens, last.logprobs, strict=True):
        print(f"{token:6} {json.dumps(s.tokenizer.decode([token])):16} {value:8.4f}")


def samples(args) -> list:
    """Completions and their tokens."""
    return [
        "## 4. The completions",
        r"$$y_t \sim \pi(\cdot \mid x, y_{<t}), \qquad \pi = \mathrm{softmax}(z / T), "
        rf"\quad T = {args.temperature}$$",
        "z are the logits. The sampler keeps each token's log-prob at the temperature it sampled "
        "with. The prompt is computed once; its completions share it as their prefix.",
        "![a prefix of prompt tokens with four completions](tree.svg)",
        code(train.roll_out, "params = replace", "done = author.generate", "tokenizer=job"),
        code(draw.sample_rows, "logprobs = (logits"),
        "Problem and sample, length, how it ended, text:",
        show_completions,
        "The last one, token by token:",
        show_tokens]


def show_verdicts(s):
    G = s.args.group_size
    for i, text in enumerate(s.batch.texts):
        v = rewards.verify(s.batch.problems[i // G].answer, text)
        assert v.verdict == s.batch.verdicts[i]
        print(f"{i // G}.{i % G} {v.verdict:12} {v.extracted!r}, {v.rule}")


def show_truncation(s):
    print("rewards  ", s.calls["truncation"].given[0].tolist())
    print("and after", s.batch.rewards.tolist())


def show_advantages(s):
    for i, row in enumerate(s.calls["group_advantages"].result):
        print(f"problem {i}: A = {rounded(row, 2)}")


def verdicts(args) -> list:
    """Verdicts, rewards, advantages."""
    return [
        "## 5. The rewards",
        "Each completion is judged while others still decode. The rule says where the answer was "
        "found and what settled it: equal text, two numbers compared, or no mathematics in it.",
        code(train.roll_out, "futures[i] = job", "values, verdicts = zip"),
        code(rewards.worth, "return Reward"),
        show_verdicts,
        "A completion cut off at the limit earns nothing (`--truncated zero`), whatever its text "
        "says; a penalty stays:",
        code(grpo.truncation, 'if policy == "zero"', "clamp(max=0)"),
        show_truncation,
        "## 6. The advantages",
        r"$$A_i = r_i - \frac{1}{G} \sum_{j=1}^{G} r_j$$",
        "GRPO's baseline (arXiv 2402.03300) without its division by the standard deviation (Dr. "
        "GRPO, arXiv 2503.20783). A group whose rewards are all equal gets exactly 0 and is left "
        "out of the forward.",
        code(grpo.group_advantages, "centred = rewards", "return torch.where"),
        code(minibatches, "live = ", "if args.kl_coef or", "live[:] = True"),
        show_advantages]


def show_pack(s):
    p = s.packed
    ((groups, n, C, P),) = p.attend.buckets
    print(f"groups {len(groups)}, completions {n}, prefix {P}, longest completion in the row {C}")
    print("input_ids", list(p.input_ids.shape), "=", P, "+",
          " + ".join(str(x - 1) for x in p.lengths))
    print(f"position_ids 0 .. {P - 1}, then {P} .. {P + p.lengths[0] - 2} and so on, once a "
          "completion")
    print("targets", list(p.targets.shape), "=", " + ".join(map(str, p.lengths)) + ", read at "
          f"hidden_index {p.hidden_index[:3].tolist()} ...")


def show_logprobs(s):
    _, logprobs, old, *_ = s.calls["policy_loss"].given
    logprobs, ratio = logprobs.detach().cpu(), (logprobs - old).exp()
    trained = s.batch.completions[-len(s.packed.lengths):]
    sampled = torch.tensor([x for c in trained for x in c.logprobs])
    print(f"first three: sampler {rounded(sampled[:3])}, trainer {rounded(logprobs[:3])}")
    print(f"max |trainer - sampler| = {(logprobs - sampled).abs().max():.6f}")
    print(f"ratio from {ratio.min():.6f} to {ratio.max():.6f}")
    print(f"mean entropy {s.calls['completion_logprobs'].result[1].mean():.4f} nats")


def forward(args) -> list:
    """Packing, log-probs, entropy."""
    return [
        "## 7. The pack",
        "Every token stands once in a row without padding: prefixes (the prompts), then "
        "completions. A completion continues its prefix's positions. Its last token is a target "
        "only, so it is not in the row.",
        "![the packed row, and a mask of what attends to what](packing.svg)",
        code(decoder.pack, "inputs = ", "hidden_index +="),
        show_pack,
        "## 8. Log-probs and entropy",
        r"$$\log \pi(y_t) = \frac{z_{y_t}}{T} - \log \sum_v e^{z_v / T}, "
        r"\qquad H_t = -\sum_v \pi_v \log \pi_v$$",
        code(decoder.completion_hidden, "return model("),
        code(decoder.completion_logprobs, "return linear"),
        code(row_statistics, "logsumexp = ", "out[0, rows] = ", "out[1, rows] = "),
        "Sampler and trainer run the same weights at the same temperature. So their log-probs "
        r"agree up to rounding. $\pi_{old}$ in the loss is not the sampler's number. It is the "
        "trainer's own, before the batch's first optimizer step. So the ratio is exactly 1 here. "
        "It moves only where a batch has a second optimizer step (`--minibatches 2`, "
        "`--inner-epochs 2`):",
        show_logprobs]


def show_loss(s):
    _, _, _, advantages, lengths, weight, _ = s.calls["policy_loss"].given
    terms = " ".join(f"{a:+.2f} * {n}" for a, n in zip(advantages, lengths, strict=True))
    print(f"N = {s.calls['token_weights'].given[2]:.0f}, w_t = {weight[0]:.6f}")
    print(f"L = -{weight[0]:.6f} * ({terms}) = {s.calls['policy_loss'].result[0].item():+.6f}")


def show_clipping(s):
    norm, limit = s.metrics["grad_norm"], s.args.max_grad_norm
    print(f"norm {norm:.4f}, c = {limit}: times {min(1, limit / norm):.4f}")


def loss(args) -> list:
    """Token weights, the loss, clipping."""
    return [
        "## 9. The loss",
        r"$$L = -\sum_t w_t \min\big(\rho_t A,\ \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) "
        r"A\big), \qquad \rho_t = \frac{\pi(y_t)}{\pi_{old}(y_t)}, \quad w_t = \frac{1}{N}$$",
        "The ratio rho_t has nothing to do with the share rho of section 2. The clip is PPO's "
        "(arXiv 1707.06347), the weight DAPO's (arXiv 2503.14476). N counts the tokens of the "
        "whole batch, those of the group without variance too.",
        code(grpo.token_weights, "divisor = max(1, total_tokens)", "weights = (divisor"),
        code(grpo.policy_loss, "log_ratio = logprobs", "ratio = log_ratio.clamp",
             "surrogate = clipped_surrogate", "value = -(weights"),
        code(grpo.clipped_surrogate, "clipped = ratio", "surrogate = torch.min"),
        show_loss,
        "At ratio 1 the loss says little. Its gradient is that of the log-probs, weighted by the "
        "advantages.",
        "## 10. Gradient clipping",
        r"$$g \leftarrow g \cdot \min\Big(1, \frac{c}{\lVert g \rVert}\Big)$$",
        code(Policy.step, "scale = min"),
        show_clipping]


def show_step(s):
    lr = s.args.learning_rate
    master, m, v = (x[ENTRY].item() for x in s.policy.state()[NAME].values())
    m, v = m / 0.1, v / 0.05                            # without AdamW's bias towards zero
    print(f"{NAME}[{ENTRY}]: gradient {m:+.6f}, by the formula "
          f"{-m / (v ** 0.5 + 1e-8):+.4f} learning rates")
    print(f"{s.before:.6f} -> {master:.6f}, that is {(master - s.before) / lr:+.2f} times {lr}")


def show_change(s):
    _, logprobs, _, advantages, lengths, *_ = s.calls["policy_loss"].given
    before, after = (grpo.sequence_sum(x.detach(), lengths) for x in (logprobs, s.after))
    for i, (a, x, y) in enumerate(zip(advantages, before, after, strict=True)):
        print(f"1.{i} A = {a:+.2f}: {x:9.4f} -> {y:9.4f}  ({y - x:+.4f})")


def learning(args) -> list:
    """AdamW, and what has become of the completions."""
    return [
        "## 11. AdamW on fp32 masters",
        r"$$\theta \leftarrow \theta - \eta\, \frac{\hat m}{\sqrt{\hat v} + 10^{-8}}, \qquad "
        r"\hat m = \frac{m}{1 - \beta_1^k}, \quad \hat v = \frac{v}{1 - \beta_2^k}$$",
        "(arXiv 1711.05101; no weight decay.) A bf16 weight and a 16-bit remainder beside it are an "
        "fp32 master, which takes the step. In fp32, as here, the weight is its own. In the first "
        "step every weight with a gradient moves by nearly the learning rate.",
        code(AdamW.step, "adamw([master]", "weight_decay="),
        code(Policy.step, "warm = ", "self.gather()"),
        show_step,
        "## 12. What has changed",
        "The log-prob of each whole completion of the group, before and after. So few completions "
        "at the full learning rate move the model far. The main job has 96 a step and warms up.",
        show_change]


def contents() -> list:
    """What both files hold, in order: texts and cells."""
    args = settings([*FLAGS.split(), "--eval-problems", "0"])
    return [item for part in (prompts, samples, verdicts, forward, loss, learning)
            for item in part(args)]


if __name__ == "__main__":
    from docs import notebook

    notebook.write()
