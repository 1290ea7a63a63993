"""Evaluate a model: accuracy under every persona, the persona lottery, and whether it still plays the character.

    python evaluate.py --model smollm2-135m --task arithmetic --personas test --out runs/eval      # one arm
    python evaluate.py --compare runs/a/evaluation/after runs/b/evaluation/after                   # arms side by side

All personas get the same problems, decoded greedily in one call of the sampler: the training sampler, template and
verifier, so that nothing differs from training but the weights. The prompt without persona, named `none`, is always
asked too. It is the reference, not a ticket of the lottery: PSS and the other scores range over the P personas alone.

Fidelity needs no judge: a frozen start model names the persona that wrote an answer (`persona_identification`), and
the policy says how far the persona moved it (`style_shift`). In evaluation/ are the measures and their intervals
(measures.py), those in which the luck of a lottery cancels (lottery.py), arms side by side with the hypotheses
(compare.py), pictures (report.py) and PersonaGym with a judge model (judge.py).

Answers are kept in `--out` as they come, so the command that was interrupted, given again, goes on where it was.

Out comes `results.json` (numbers, and the whole table of right and wrong: any other score can be computed later),
`transcripts.jsonl` (the answers), `report.html` and its plots as PNG. Left out: multiple choice by log-likelihood,
and tasks without one verifiable answer.
"""

import argparse
import json
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import personas as pool
import rewards
import rollout
import tasks
import weights
from common import files
from common.files import write_atomically
from evaluation import compare, judge, lottery, measures, report
from evaluation.compare import run_of
from model import completion_logprobs, pack

NONE = "none"  # the name of the prompt without a persona in every result
FIDELITY = ("persona_identification", "log_posterior", "self_identification", "self_log_posterior", "style_shift")


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: one pass over personas x problems


def sample(model, tokenizer, prompts, n=1, log=None, **sampling):
    """n completions a prompt in one call of the sampler -> list over prompts of lists of (text, Completion).

    log: a file that takes each completion as it is done; those that it holds of this very call are not sampled again.
    That changes nothing: a sample depends on the model, its prompt, the settings and its place, not on the batch (in
    half precision: up to the rounding of its matmuls).
    """
    table, call = [[None] * n for _ in prompts], fingerprint(model, prompts, n, sampling) if log else None
    for row in files.rows(log) if log else ():
        if row["call"] == call:
            table[row["index"]][row["sample"]] = rollout.Completion(row["index"], row["sample"], row["tokens"], [],
                                                                    row["truncated"], error=row["error"])
    todo = [i for i, row in enumerate(table) if None in row]
    settings = {"max_tokens" if key == "max_new_tokens" else key: value for key, value in sampling.items()}
    params = rollout.SamplingParams(n, **settings)
    with log.open("a", encoding="utf-8") if log else nullcontext() as file:
        for done in rollout.generate(model, [prompts[i] for i in todo], params, keys=todo):
            done = replace(done, index=todo[done.index])
            table[done.index][done.sample] = done
            if file:
                files.append(file, {"call": call, "index": done.index, "sample": done.sample, "tokens": done.tokens,
                                    "truncated": done.truncated, "error": done.error})
    return [[(tokenizer.decode(done.tokens, skip_special_tokens=True), done) for done in row] for row in table]


def fingerprint(model, *asked):
    """A number for these weights and what they are asked: every 997th weight, since a training step moves them all."""
    number = zlib.crc32(repr(asked).encode())
    for weight in model.parameters():
        number = zlib.crc32(weight.detach().flatten()[::997].float().contiguous().cpu().numpy(), number)
    return number


def ask(model, tokenizer, problems, personas, n=1, log=None, **sampling):
    """Every problem under every persona (None: none), n answers each, verified -> transcripts, persona by persona."""
    pairs = [(persona, problem) for persona in personas for problem in problems]
    prompts = [pool.prompt_ids(tokenizer, problem.question, persona) for persona, problem in pairs]
    rows, answers = [], sample(model, tokenizer, prompts, n, log, **sampling)
    with rewards.Verifier() as verifier:
        verdicts = [[verifier.submit(problem.answer, text) for text, _ in outs]
                    for (_, problem), outs in zip(pairs, answers, strict=True)]
    for (persona, problem), outs, judged in zip(pairs, answers, verdicts, strict=True):
        for number, ((text, done), future) in enumerate(zip(outs, judged, strict=True)):
            verdict = future.result()
            rows.append({"persona": persona.name if persona else NONE, "id": problem.id, "kind": problem.kind,
                         "question": problem.question, "gold": problem.answer, "answer": text, "sample": number,
                         "temperature": sampling["temperature"], "correct": verdict.verdict == "correct",
                         "verdict": verdict.verdict, "extracted": verdict.extracted.strip(),
                         "tokens": len(done.tokens), "truncated": done.truncated, "error": done.error})
    return rows


def evaluate(model, tokenizer, problems, personas, seed=0, max_new_tokens=32, out=None, info=None, samples=0,
             noise_floor=False, temperature=0.7, fidelity_args=None, gym_args=None):
    """Accuracy of every persona on the same problems, greedily -> the results dict (and all files, given a folder
    `out`).

    info: what the caller knows and the result should carry (model, task, method). samples: answers a prompt for
    pass@k at `temperature`. noise_floor: rerun the prompt without persona, sampled, once per persona. fidelity_args,
    gym_args: keyword arguments of `fidelity` and `personagym`. ValueError without problems, or without personas of
    distinct names.
    """
    start = time.time()
    names = [NONE] + [persona.name for persona in personas]
    if not problems or not personas or len(set(names)) < len(names):
        raise ValueError(f"evaluation needs problems, and personas with different names (none of them '{NONE}')")
    n_items, sampling, log = len(problems), {"max_new_tokens": max_new_tokens, "seed": seed}, log_in(out)
    rows = ask(model, tokenizer, problems, [None, *personas], log=log, temperature=0.0, **sampling)
    results = {"model": "", "task": "", "method": "", "command": " ".join(sys.argv), "commit": files.commit()}
    results |= (info or {}) | sampling | summary(as_table(rows, n_items), problems, personas, seed)
    for row, more in zip(results["personas"], lengths(rows, n_items), strict=True):
        row |= more
    results |= {key: sum(row[k] for row in rows) / len(rows)
                for key, k in (("tokens_per_answer", "tokens"), ("truncated_fraction", "truncated"))}
    results["errors"] = sum(row["error"] is not None for row in rows)
    reruns, drawn, fidelity_rows = [], [], []
    sampling |= {"temperature": temperature, "log": log}
    if noise_floor:
        reruns = ask(model, tokenizer, problems, [None], len(personas), **sampling)
        results["noise_floor"] = floor(reruns, n_items, temperature, seed)
    if samples:
        drawn = ask(model, tokenizer, problems, [None, *personas], samples, **sampling)
        results["pass_at_k"] = pass_at_k(drawn, n_items, samples, temperature, seed)
    results["inference_time_rivals"] = rivals(rows, reruns or drawn[:n_items * samples], len(personas), seed)
    if fidelity_args is not None:
        results["fidelity"], fidelity_rows = fidelity(model, tokenizer, personas, seed=seed, log=log, **fidelity_args)
    if gym_args is not None:
        gym = personagym(model, tokenizer, seed=seed, log=log, **gym_args)
        results["fidelity"] = results.get("fidelity", {}) | {"personagym": gym}
    results["seconds"] = round(time.time() - start, 2)
    if out is not None:
        write(results, rows + drawn + fidelity_rows, out)
        log.unlink()
    return results


def log_in(out):
    """The file in the folder `out` that keeps answers until the results are written; without a folder none."""
    if out is None:
        return None
    Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out) / "answers.jsonl.part"


def as_table(rows, n_items):
    """Transcripts with one answer a prompt, persona by persona -> [N, columns] of 0 and 1."""
    return np.array([row["correct"] for row in rows], dtype=float).reshape(-1, n_items).T


def lengths(rows, n_items):
    """How long each persona's answers are, from transcripts with one answer a prompt -> a dict each:
    `tokens` an answer, `truncated` (the share cut off), and `accuracy_finished`, among the others
    (None where all were cut off). A lottery of length is none of competence."""
    table = np.array([[row["tokens"], row["truncated"], row["correct"]] for row in rows], float)
    out = []
    for tokens, cut, right in table.reshape(-1, n_items, 3).transpose(0, 2, 1):
        finished = float(right[cut == 0].mean()) if not cut.all() else None
        out.append({"tokens": float(tokens.mean()), "truncated": float(cut.mean()),
                    "accuracy_finished": finished})
    return out


def summary(table, problems, personas, seed):
    """All measures of one table of right and wrong [N, 1 + P], column 0 without a persona -> dict for results.json."""
    n, correct = len(problems), table[:, 1:]
    kinds = np.array([problem.kind for problem in problems])
    rows = []
    for column, (name, stratum) in zip(table.T, [(NONE, NONE)] + [(p.name, p.stratum) for p in personas], strict=True):
        low, high = measures.wilson(column.sum(), n)
        by_kind = {str(kind): float(column[kinds == kind].mean()) for kind in np.unique(kinds)}
        rows.append({"name": name, "stratum": stratum, "accuracy": float(column.mean()), "n": n,
                     "accuracy_low": low, "accuracy_high": high, "by_kind": by_kind})
    counts = measures.resamples(n, seed=seed)
    values = measures.table_scores(correct) | {"no_persona_accuracy": table[:, 0].mean()}
    draws = measures.bootstrap(correct, counts, seed) | {"no_persona_accuracy": counts @ table[:, 0] / n}
    scores = measures.with_intervals(values, draws) | lottery_scores(correct, personas, seed)
    return {"personas": rows} | scores | {
        "lottery": measures.lottery(correct.mean(axis=0)).tolist(),
        "lottery_held_out": measures.held_out_lottery(correct, seed).tolist() if n > 1 else [],
        "items": [{"id": problem.id, "kind": problem.kind} for problem in problems],
        "correct": {row["name"]: "".join("01"[int(c)] for c in table[:, j]) for j, row in enumerate(rows)}}


def lottery_scores(correct, personas, seed):
    """The measures in which luck cancels, of one table [N, P], with intervals; None for what the
    table is too small for or its personas do not have."""
    found = lottery.estimates([correct], [p.stratum for p in personas], seed)
    out = dict.fromkeys(lottery.NAMES) | compare.arm_scores(found) | measures.no_effect([correct], seed)
    return out | {"pss_without_one": lottery.leave_one_out([correct], [p.name for p in personas])}


def floor(reruns, n_items, temperature, seed):
    """The scores over sampled reruns of one and the same prompt: what no persona effect looks like."""
    table = np.array([row["correct"] for row in reruns], dtype=float).reshape(n_items, -1)
    draws = measures.bootstrap(table, measures.resamples(n_items, seed=seed), seed)
    return measures.with_intervals(measures.table_scores(table), draws) | {
        "temperature": temperature, "reruns": table.shape[1], "lottery": measures.lottery(table.mean(axis=0)).tolist()}


def pass_at_k(rows, n_items, n, temperature, seed):
    """pass@k, k = 1, 2, 4 ... n, without persona and on the mean over personas, with intervals over items."""
    hits = np.array([row["correct"] for row in rows]).reshape(-1, n_items, n).sum(axis=2)  # [1 + P, N]
    counts, out = measures.resamples(n_items, seed=seed), {}
    for k in sorted({min(2**j, n) for j in range(n.bit_length() + 1)}):
        chance = np.array([measures.pass_at_k(h, n, k) for h in range(n + 1)])[hits]
        columns = {"none": chance[0], "personas": chance[1:].mean(axis=0)}
        out[str(k)] = measures.with_intervals({name: c.mean() for name, c in columns.items()},
                                              {name: counts @ c / n_items for name, c in columns.items()})
    return {"n": n, "temperature": temperature, "k": out}


# ----------------------------------------------------------------------------------------------------------------------
# Rivals that spend tokens at inference instead of training


def rivals(rows, reruns, n_personas, seed):
    """Accuracy and generated tokens per answered item of what one may do at inference instead of training.

    Greedy `rows` (no persona first) give the persona search, scored on items it did not pick with, and the vote over
    personas; sampled `reruns` without persona give the vote over samples. The search pays for its picking half.
    """
    n_items = len(rows) // (1 + n_personas)
    table = as_table(rows, n_items)
    cost = np.array([row["tokens"] for row in rows]).reshape(-1, n_items).mean(axis=1)  # tokens an answer, by persona
    out = [("no persona", table[:, 0].mean(), cost[0]), ("a persona at random", table[:, 1:].mean(), cost[1:].mean())]
    if n_items > 1:
        kept, each = measures.held_out_lottery(table[:, 1:], seed), cost[1:].mean()
        picking = (n_items // 2) / (n_items - n_items // 2) * each                      # of one persona, per item kept
        out += [(f"best of {k} personas, picked on a held-out half", kept[k - 1], k * picking + each)
                for k in sorted({2, 4, 8, 16, n_personas}) if k <= n_personas]
    out.append((f"majority of {n_personas} personas", measures.majority(rows[n_items:]), cost[1:].sum()))
    if reruns:
        spent = sum(row["tokens"] for row in reruns) / n_items
        out.append((f"majority of {len(reruns) // n_items} samples without persona", measures.majority(reruns), spent))
    return [{"name": name, "accuracy": float(accuracy), "tokens_per_item": float(cost)} for name, accuracy, cost in out]


# ----------------------------------------------------------------------------------------------------------------------
# Fidelity


def fidelity(model, tokenizer, personas, questions, start_model, seed=0, k=8, max_new_tokens=48, log=None):
    """Does an answer to an open question still tell its persona? -> (dict for results.json, role-play transcripts).

    The answer y ~ pi(. | q, s) is read by the frozen start model: log p(y | q, s') for k candidates s', right when its
    own persona wins. That measures drift from the start model (`persona_identification`, `log_posterior`). The model
    itself reads too: how much its answers depend on the persona, whatever it has drifted (`self_identification`,
    `self_log_posterior`). Candidates come in blocks of k personas, drawn anew for each question, each other's rivals.
    style_shift: mean per token of log pi(y | q, s) - log pi(y | q, none) under the model. Each role-play transcript has
    its candidates and both readers' log-probs. Intervals over questions and personas.
    """
    k, n = min(k, len(personas)), len(personas)
    if k < 2 or not questions:
        raise ValueError("fidelity needs at least 2 personas and 1 question")
    prompts = [[pool.prompt_ids(tokenizer, q, persona) for persona in [*personas, None]] for q in questions]
    outs = sample(model, tokenizer, [p for row in prompts for p in row[:n]], log=log, temperature=0.9, top_p=0.9,
                  seed=seed, max_new_tokens=max_new_tokens)
    tables = {name: np.zeros((len(questions), n)) for name in FIDELITY}
    rows, rng = [], np.random.default_rng(seed)
    for q, question in enumerate(questions):
        texts, ys = zip(*[(out[0][0], out[0][1].tokens) for out in outs[q * n:(q + 1) * n]], strict=True)
        read = {}                                       # persona -> what its transcript tells of the readers
        for members, candidates in blocks(n, k, rng):
            written = [ys[p] for p in members]
            asked = [(prompts[q][c], written) for c in candidates]
            by_start = by_self = total_logprobs(start_model, asked).reshape(k, -1).T
            if model is not start_model:
                by_self = total_logprobs(model, asked).reshape(k, -1).T
            plain = total_logprobs(model, [(prompts[q][n], written)])
            shift = (np.diagonal(by_self) - plain) / [max(len(y), 1) for y in written]
            found = *measures.identification(by_start), *measures.identification(by_self), shift
            for table, values in zip(tables.values(), found, strict=True):
                table[q, members] = values
            told = [personas[c].name for c in candidates]
            read |= {p: {"candidates": told, "by_start": a.round(3).tolist(), "by_self": b.round(3).tolist()}
                     for p, a, b in zip(members, by_start, by_self, strict=True)}
        rows += [{"persona": persona.name, "id": f"roleplay-{q}", "kind": "roleplay", "question": question,
                  "answer": text, "tokens": len(y)} | {name: table[q, p] for name, table in tables.items()} | read[p]
                 for p, (persona, text, y) in enumerate(zip(personas, texts, ys, strict=True))]
    out = measures.with_intervals({name: t.mean() for name, t in tables.items()},
                                  {name: measures.crossed(t, seed) for name, t in tables.items()})
    tables = {name: t.round(4).tolist() for name, t in tables.items()}
    return out | {"chance": 1 / k, "candidates": k, "questions": list(questions), "tables": tables}, rows


def blocks(n, k, rng):
    """n personas in random blocks (members, candidates): k candidates, members first; a short block borrows others."""
    order = rng.permutation(n)
    for start in range(0, n, k):
        members = order[start:start + k]
        yield members, np.concatenate([members, order[:k - len(members)]])


@torch.no_grad()
def total_logprobs(model, groups):
    """log p(completion | prompt) summed over its tokens [M], for groups of (prompt_ids, [completion_ids, ...])."""
    logprobs, _ = completion_logprobs(model, pack(groups, model))
    lengths = [len(completion) for _, completions in groups for completion in completions]
    return np.array([part.sum().item() for part in logprobs.cpu().double().split(lengths)])


def personagym(model, tokenizer, questions, grader, name, folder, price=(0.0, 0.0), seed=0, max_new_tokens=128,
               log=None):
    """PersonaGym: answers in character at temperature 0.9, top-p 0.9, graded by evaluation/judge.py -> dict."""
    speakers = [pool.from_row("", {"persona": row["persona"]}) for row in questions]
    prompts = [pool.prompt_ids(tokenizer, row["question"], p) for row, p in zip(questions, speakers, strict=True)]
    outs = sample(model, tokenizer, prompts, log=log, temperature=0.9, top_p=0.9, seed=seed,
                  max_new_tokens=max_new_tokens)
    rows = [row | {"answer": out[0][0]} for row, out in zip(questions, outs, strict=True)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    scores = judge.grade(rows, grader, name, folder, seed, price)
    write_atomically(Path(folder) / "personagym.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write(results, transcripts, folder):
    """transcripts.jsonl, report.html, PNG plots, and last results.json: where that exists, the rest is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "transcripts.jsonl", "".join(json.dumps(row) + "\n" for row in transcripts))
    label, metrics = results["method"] or results["model"] or "model", run_of(folder)[1]
    report.write({label: results}, [transcripts], folder, {label: metrics} if metrics else {})
    write_atomically(folder / "results.json", json.dumps(results, indent=1))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def table_text(results):
    """The table that the command prints: personas from best to worst, then the scores with their intervals."""
    rows = [[row["name"], *(f"{row['accuracy' + end]:.3f}" for end in ("", "_low", "_high"))]
            for row in report.ranked(results)[::-1]]
    rows += [[name, *(f"{results[name + end]:.3f}" for end in ("", "_low", "_high"))] for name in measures.SCORES]
    lines = [compare.aligned([["persona, then score", "value", "95 % from", "to"], *rows]),
             lottery_text(results),
             f"{100 * results['truncated_fraction']:.0f} % of the answers were cut at {results['max_new_tokens']} "
             "tokens (--max-new-tokens)"]
    if results["errors"]:
        lines.append(f"{results['errors']} answers were given up where logits were not finite: try --dtype float32")
    return "\n".join(lines)


def lottery_text(results):
    """What the lottery is worth without luck, in a few lines."""
    def shown(name):
        values = [results.get(name + end) for end in ("", "_low", "_high")]
        return "not measured" if None in values else report.interval(*values, name=name)

    one = results["pss_without_one"]
    rests = f"; between {one['low']:.3f} and {one['high']:.3f} without one persona ({one['persona']})" if one else ""
    return "\n".join([
        f"persona_sd, the true spread over personas in points: {shown('persona_sd')}, p = "
        f"{results['persona_sd_p']:.3f} without any effect; in logits {shown('persona_sd_logit')}",
        f"harmful_gap, what harmful personas cost in points: {shown('harmful_gap')}",
        f"pss would be {shown('pss_shuffled')} if personas made no difference; without luck it is "
        f"{shown('pss_deconvolved')}{rests}"])


def parse(argv):
    """The command line as a namespace."""
    parser = files.Parser(description=__doc__.split("\n")[0],
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="smollm2-135m, a Hugging Face folder or id, a .gguf file")
    add("--task", default="arithmetic", help="arithmetic, facts, svamp, gsm8k, math, math500 or a .jsonl file")
    add("--personas", default="test", help=f"{', '.join(pool.POOLS)}, or a .jsonl file")
    add("--out", default="runs/evaluation", help="folder for results.json, report.html and plots")
    add("--limit", type=int, default=50, help="number of problems")
    add("--seed", type=int, default=0, help="of generated problems, sampling and bootstrap")
    add("--max-new-tokens", type=int, help="longest answer (default: that of the model's run, else 32)")
    add("--prompt", choices=sorted(tasks.PROMPTS), help="how a problem is put (default: as in the model's run)")
    add("--dtype", default="auto", choices=["auto", *weights.DTYPES], help="of compute")
    add("--device", default="auto", choices=weights.DEVICES, help="auto: the GPU if there is one, else the CPU")
    add("--method", help="the arm's role, for --compare (default: of the run that the model lies in, else start)")
    add("--samples", type=int, default=0, help="answers a prompt, for pass@k")
    add("--noise-floor", action="store_true", help="rerun the prompt without persona, sampled, once per persona")
    add("--temperature", type=float, default=0.7, help="of --samples and --noise-floor")
    add("--fidelity", type=int, nargs="?", const=8, default=0, metavar="N",
        help="identify personas by their answers to N open questions (8 without a number)")
    add("--start-model", help="frozen scorer of --fidelity (default: that of the model's run, else the model)")
    add("--personagym", metavar="FILE", help="PersonaGym's questions, graded by --judge-model")
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint, key in JUDGE_API_KEY (default: in this process)")
    add("--judge-model", default="smollm2-135m", help="name at --judge, or a model as for --model")
    add("--judge-concurrency", type=int, default=4, help="questions asked of --judge at a time")
    add("--judge-price", nargs=2, type=float, default=(0.0, 0.0), metavar=("IN", "OUT"), help="per million tokens")
    add("--compare", nargs="+", metavar="DIR", help="evaluation folders to put side by side, into --out")
    add("--roles", nargs="+", help="names for the folders of --compare: start, rlvr, permix, ...")
    return parser.parse_args(argv)


def one_arm(args):
    """Evaluate one model as the flags say -> the results dict, written to --out."""
    for name, least in (("max_new_tokens", 1), ("samples", 0), ("fidelity", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    run, fidelity_args, gym_args = run_of(args.model)[0], None, None
    trained = run.get("settings", {})  # of the training run that the model lies in
    prompt, max_new_tokens = args.prompt or trained.get("prompt", "plain"), trained.get("max_new_tokens", 32)
    problems = tasks.put(tasks.load(args.task, "test", args.seed, args.limit), prompt)
    personas = pool.load(args.personas)
    model, tokenizer = weights.load(args.model, args.dtype, args.device)
    if args.fidelity:
        start = args.start_model or trained.get("model", args.model)
        scorer = model if start == args.model else weights.load_beside(start, tokenizer, args.dtype, args.device)
        fidelity_args = {"questions": pool.load_roleplay("test")[:args.fidelity], "start_model": scorer}
    if args.personagym:
        grader = (judge.endpoint(args.judge, args.judge_model, args.judge_concurrency) if args.judge
                  else judge.local(*weights.load(args.judge_model, args.dtype, args.device)))
        gym_args = {"questions": judge.questions(args.personagym), "grader": grader, "name": args.judge_model,
                    "folder": args.out, "price": args.judge_price}
    info = {"model": args.model, "task": args.task, "prompt": prompt, "method": "start", "training_seed": None}
    info |= compare.arm_of(run) | ({"method": args.method} if args.method else {})
    return evaluate(model, tokenizer, problems, personas, args.seed, args.max_new_tokens or max_new_tokens, args.out,
                    info, args.samples, args.noise_floor, args.temperature, fidelity_args, gym_args)


def main(argv=None):
    """The command line; a user's mistake is one line on stderr and exit 2, Ctrl-C one line and exit 130."""
    args = parse(argv)
    try:
        print(compare.text(compare.folders(args.compare, args.out, args.roles, args.seed)) if args.compare
              else table_text(one_arm(args)))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if args.compare else "; the same command goes on where this one was"
        print(f"\nevaluate.py: stopped{goes_on}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
