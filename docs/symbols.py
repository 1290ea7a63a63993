r"""Writes docs/symbols.md: the symbols of the papers, and the line here that computes each.

    python docs/symbols.py

A line is named by the way to it: `grpo.py:policy_loss.ratio` is where `ratio` is first bound inside
`policy_loss`. It is looked up in the syntax tree, so a name that is gone is an error and no line
number is typed. Equation numbers are those of the arXiv papers, where we know them; else the
section stands there, or nothing.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENING = """# Symbols, and the lines that compute them

Written by [symbols.py](symbols.py); a test holds it to the code. A number in brackets is an
equation of the paper in the heading, one without is a section. A name is a function, or what stands
in one: `policy_loss.ratio` is the variable `ratio` in `policy_loss`, `kl.k3` the case "k3" in `kl`.
Each table has its own paper's letters.
"""

# heading: rows of (symbol, what it is, where it stands in the paper, ways to the lines here)
SYMBOLS = {
    "Mixing personas (PerMix-RLVR, arXiv 2604.08986; the scheme is our reading)": [
        (r"\rho", "share of prompts with a persona", "", "personas.py:mix.prob"),
        ("s", "the persona that is drawn, or none", "", "personas.py:draw"),
        ("x", "the prompt's token ids: persona and problem", "", "personas.py:prompt_ids"),
        ("G", "completions of a problem", "", "personas.py:mix.group_size"),
        ("y_i", "a completion", "", "rollout.py:Completion"),
        ("r_i", "its reward, 0 or 1", "", "rewards.py:worth"),
        (r"D_{KL}(\pi_{start} \Vert \pi)", "expressivity anchor, exact over the vocabulary", "",
         "training/anchor.py:Anchor.kl"),
    ],
    "Sampling and log-probs": [
        ("T", "temperature, of sampling and of the log-probs", "",
         "sampling/draw.py:sample.temperature"),
        ("u", "uniform number of a token, a function of seed, problem and sample", "",
         "sampling/draw.py:sample.uniforms"),
        (r"F^{-1}(u)", "the token drawn: inverse of the cumulative distribution", "",
         "sampling/draw.py:sample_rows.cdf"),
        (r"\log \pi(y_t)", "log-prob of a token", "",
         "model.py:completion_logprobs, kernels/torch_linear_logprob.py:row_statistics"),
        ("H_t", "entropy, in nats", "",
         "kernels/torch_linear_logprob.py:LinearLogprob.forward.entropy"),
        (r"\partial z", "gradient of the logits, by hand", "",
         "kernels/torch_linear_logprob.py:logit_gradient"),
    ],
    "PPO (arXiv 1707.06347)": [
        (r"r_t(\theta)", "ratio of new to old probability", "(6)", "grpo.py:policy_loss.ratio"),
        (r"\pi_{old}", "before the batch's first optimizer step", "(6)",
         "training/minibatches.py:MicroBatch.old"),
        (r"\epsilon", "how far the ratio may move", "(7)",
         "grpo.py:Loss.clip_low, grpo.py:Loss.clip_high"),
        (r"\mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon)", "the clipped ratio", "(7)",
         "grpo.py:clipped_surrogate.clipped"),
        (r"L^{CLIP}", "the smaller of the two surrogates", "(7)", "grpo.py:clipped_surrogate"),
        ("c_2 S", "entropy bonus", "(9)", "grpo.py:Loss.entropy_coef"),
        (r"c", "bound for bad tokens: dual-clip PPO, arXiv 1912.09729", "",
         "grpo.py:Loss.dual_clip"),
    ],
    "GRPO (DeepSeekMath, arXiv 2402.03300)": [
        (r"\hat A_{i,t}", "reward minus the group's mean, over its standard deviation", "4.1.2",
         "grpo.py:group_advantages.std"),
        (r"\frac{1}{G} \sum_i \frac{1}{\vert o_i \vert}", "every completion counts alike", "(3)",
         "grpo.py:token_weights.sequence"),
        (r"J_{GRPO}", "the objective; its negative is the loss", "(3)",
         "grpo.py:policy_loss.value"),
        (r"\beta", "weight of the KL", "(3)", "grpo.py:Loss.kl_coef"),
        (r"D_{KL}(\pi \Vert \pi_{ref})", "its unbiased estimate, k3", "(4)", "grpo.py:kl.k3"),
        (r"\pi_{ref}", "the frozen start model", "(4)", "training/run.py:start_model"),
        (r"\mu", "how often a batch is gone through", "Algorithm 1",
         "training/settings.py:FLAGS.inner-epochs"),
    ],
    "KL estimators (Schulman 2020, Approximating KL divergence)": [
        (r"\log r", r"log of $\pi_{ref} / \pi$ at a token", "", "grpo.py:kl.difference"),
        ("k_1", r"$-\log r$: unbiased, of either sign", "", "grpo.py:kl.k1"),
        ("k_2", r"$(\log r)^2 / 2$: its gradient is the KL's", "", "grpo.py:kl.k2"),
        ("k_3", r"$(r - 1) - \log r$: unbiased, never negative", "", "grpo.py:kl.k3"),
        (r"\log \pi(y) - \log \pi_{ref}(y)", "the KL in the reward", "", "grpo.py:kl_reward"),
    ],
    "RLOO (arXiv 2402.14740)": [
        (r"\frac{1}{G-1} \sum_{j \ne i} r_j", "baseline: the mean of the others", "",
         "grpo.py:group_advantages.rloo"),
    ],
    "DAPO (arXiv 2503.14476)": [
        (r"\hat A_{i,t}", "as GRPO's", "(9)", "grpo.py:group_advantages.std"),
        (r"\varepsilon_{low}, \varepsilon_{high}", "clip-higher", "(10)", "grpo.py:RECIPES.dapo"),
        (r"0 < \vert \lbrace o_i \text{ correct} \rbrace \vert < G",
         "dynamic sampling: groups with unequal rewards", "(11)",
         "grpo.py:informative, train.py:rollouts"),
        (r"\frac{1}{\sum_i \vert o_i \vert}", "token level: every token counts alike", "(12)",
         "grpo.py:token_weights.token"),
        (r"R_{length}", "soft overlong punishment", "(13)", "grpo.py:overlong_penalty"),
        (r"L_{max}, L_{cache}", "length limit, and where the punishment begins before it", "(13)",
         "grpo.py:overlong_penalty.max_tokens, grpo.py:overlong_penalty.buffer"),
        ("", "overlong filtering: what is cut off leaves the loss", "3.4", "grpo.py:truncation"),
    ],
    "Dr. GRPO (arXiv 2503.20783)": [
        (r"\hat A_{i,t}", "no division by the standard deviation", "3.2",
         "grpo.py:group_advantages.mean"),
        ("", "no division by the completion's length: a constant in its place", "3.2",
         "grpo.py:token_weights.constant"),
    ],
    "GSPO (arXiv 2507.18071)": [
        (r"s_i(\theta)", "ratio of a completion: geometric mean over its tokens", "4.1",
         "grpo.py:sequence_mean"),
        (r"\varepsilon", "its clip, far smaller than a token's", "5.1", "grpo.py:RECIPES.gspo"),
    ],
    "CISPO (MiniMax-M1, arXiv 2506.13585)": [
        (r"J_{CISPO}", "the weight is clipped, no token's gradient is lost", "(4)",
         "grpo.py:policy_loss.cispo"),
        (r"\mathrm{sg}(\hat r_{i,t})", "the clipped ratio, without gradient", "(5)",
         "grpo.py:policy_loss.bounded"),
        (r"\epsilon^{IS}_{low}, \epsilon^{IS}_{high}", "its bounds", "(5)",
         "grpo.py:RECIPES.cispo"),
    ],
    "Sampler and trainer (TIS, Yao et al. 2025; IcePop, arXiv 2510.18855)": [
        (r"\pi_{trainer} / \pi_{sampler}", "importance weight of a token or a completion", "",
         "grpo.py:sampler_correction.ratio"),
        ("C", "where it is cut, or masked", "", "grpo.py:sampler_correction.high"),
    ],
    "AdamW (arXiv 1711.05101, Algorithm 2)": [
        ("g_t", "gradient, after clipping its norm", "", "training/policy.py:Policy.step.scale"),
        (r"\beta_1, \beta_2", "decay of the moments", "", "training/adamw.py:BETAS"),
        ("m_t, v_t", "the moments", "", "training/adamw.py:AdamW.step.moments"),
        (r"\eta_t", "schedule: a linear warm-up", "", "training/policy.py:Policy.step.warm"),
        (r"\alpha", "learning rate", "", "training/adamw.py:AdamW.step.learning_rate"),
        (r"\epsilon", "keeps the division finite", "", "training/adamw.py:AdamW.step.eps"),
        (r"\lambda", "weight decay; 0 here", "", "training/adamw.py:AdamW.step.weight_decay"),
        (r"\theta_t", "the fp32 master", "", "training/adamw.py:master_of"),
    ],
    "LoRA (arXiv 2106.09685)": [
        ("W_0", "frozen weight", "(3)", "model.py:LoRALinear.weight"),
        ("A, B", r"the update is $\Delta W = BA$; B starts at 0", "(3)",
         "model.py:LoRALinear.lora_A, model.py:LoRALinear.lora_B"),
        (r"h = W_0 x + BAx", "the layer", "(3)", "model.py:LoRALinear.updated"),
        (r"\alpha / r", "scale of the update", "4.1", "weights/lora.py:add"),
    ],
    "Attention (arXiv 1706.03762)": [
        (r"\mathrm{softmax}(QK^T / \sqrt{d_k}) V",
         "attention, over a shared prefix and a row's own keys", "(1)",
         "kernels/attention.py:attention"),
        (r"1 / \sqrt{d_k}", "scale of the scores", "(1)", "model.py:Config.attn_scale"),
    ],
    "RoPE (arXiv 2104.09864)": [
        (r"\theta_i", r"frequencies $b^{-2i/d}$, from i = 0", "3.2.2",
         "model.py:inverse_frequencies.base"),
        (r"m \theta_i", "angle at position m", "(15)", "model.py:Transformer.rotary_tables.angles"),
        (r"R^d_{\Theta, m} x",
         "the rotation; it pairs i with i + d/2, the paper with its neighbour", "(34)",
         "kernels/elementwise.py:torch_rotate"),
    ],
    "RMSNorm (arXiv 1910.07467), gated MLP (arXiv 2002.05202)": [
        (r"\bar a_i", "what a layer reads", "(4)", "kernels/elementwise.py:torch_rms_norm"),
        (r"\mathrm{Swish}(xW) \otimes xV", "SwiGLU", "(5)", "kernels/elementwise.py:torch_gated"),
    ],
    "Gated DeltaNet (arXiv 2412.06464)": [
        ("S_t", "state of a head; here transposed, [key_dim, value_dim]", "3.1",
         "kernels/delta.py:delta_step.state"),
        (r"\alpha_t", r"decay, $e^g$", "3.1", "kernels/delta.py:GatedDeltaNet.forward.g"),
        (r"\beta_t", "writing strength", "3.1", "kernels/delta.py:delta_step.beta"),
        ("q_t, k_t, v_t", "query, key, value; q and k of length 1", "3.1",
         "kernels/delta.py:heads"),
        (r"\gamma", r"running product of $\alpha$ in a chunk, as the log's sum", "2.1",
         "kernels/delta.py:chunked.total"),
        (r"\Gamma", "decays between the tokens of a chunk", "2.1",
         "kernels/delta.py:chunked.decay"),
        ("W, U", "solutions of a triangular system (UT transform), here with decay", "2.2",
         "kernels/delta.py:chunked.read, kernels/delta.py:chunked.own"),
        ("", "corrections of a chunk, given its first state", "2.2", "kernels/delta.py:chunked.u"),
    ],
    "Measures (ours)": [
        (r"c[s, i, p]", "1 where seed s answers item i rightly under persona p", "",
         "evaluation/measures.py:correct_table"),
        ("a_p", "accuracy under persona p", "", "evaluation/measures.py:table_scores"),
        (r"\min_p a_p / \max_p a_p", "`pss`", "", "evaluation/measures.py:pss"),
        ("", "`pss_shuffled`: pss if personas made no difference", "",
         "evaluation/measures.py:no_effect"),
        (r"d[s, i]", "answers minus the item's mean over personas", "",
         "evaluation/lottery.py:centred"),
        ("S^2", "variance of accuracy over personas, from products over different items", "",
         "evaluation/lottery.py:products"),
        (r"\pm\sqrt{\vert S^2 \vert}", "`persona_sd`, and the part common to seeds", "",
         "evaluation/lottery.py:persona_sd, evaluation/lottery.py:persona_sd_common"),
        (r"\alpha_i, \beta_p", "conditional logit: item, persona", "",
         "evaluation/lottery.py:conditional_logit"),
        (r"\sigma^2", "`persona_sd_logit`, squared", "", "evaluation/lottery.py:logit_variance"),
        ("g", "shrinks accuracies to their true spread: `pss_deconvolved`", "",
         "evaluation/lottery.py:pss_deconvolved.g"),
        ("", "`harmful_gap`: other strata minus the harmful one", "",
         "evaluation/lottery.py:harmful_gap"),
        (r"E[\max \text{ of } k]", "the lottery: best of k personas", "",
         "evaluation/measures.py:lottery"),
        (r"\mathrm{pass@}k", "arXiv 2107.03374, (1)", "", "evaluation/measures.py:pass_at_k"),
        ("", "identification: which of k personas wrote this?", "",
         "evaluation/measures.py:identification"),
    ],
}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def bound(node: ast.AST) -> list:
    """The names that a node makes: a definition, argument, field, variable, key, case, row."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.arg() | ast.keyword():
            return [node.arg]
        case ast.Name(ctx=ast.Store()):
            return [node.id]
        case ast.Attribute(ctx=ast.Store()):
            return [node.attr]
        case ast.MatchValue(value=ast.Constant(name)) | ast.Tuple(elts=[ast.Constant(name), *_]):
            return [name]
    return []


def found(scope: ast.AST, name: str) -> ast.AST | None:
    """The node inside `scope` that binds a name: the outermost, and of these the first. Of a table
    it is the assignment, so that a row can be looked up in it."""
    for node in ast.walk(scope):                        # breadth first
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(name in bound(target) for target in targets):
                return node
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value == name:
                    return key
        if node is not scope and name in bound(node):
            return node
    return None


def line(way: str) -> int:
    """The number of the line that `file.py:outer.inner` names. Raises ValueError if none does."""
    file, names = way.split(":")
    scope = tree(file)
    for name in names.split("."):
        scope = found(scope, name)
        if scope is None:
            raise ValueError(f"{way}: {file} has no {name} there")
    return scope.lineno


def row(symbol: str, what: str, where: str, ways: str) -> str:
    here = []
    for way in ways.split(", "):
        file, name = way.split(":")
        number = line(way)
        here.append(f"[`{name}`, {file}:{number}](../{file}#L{number})")
    return f"| {f'${symbol}$' if symbol else ''} | {what} | {where} | {', '.join(here)} |"


def page() -> str:
    parts = [OPENING]
    for heading, rows in SYMBOLS.items():
        table = ["| symbol | what it is | there | here |", "|---|---|---|---|"]
        table += [row(*cells) for cells in rows]
        parts.append(f"## {heading}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "symbols.md").write_text(page(), encoding="utf-8")
