"""Evaluate a model: accuracy under every persona, the lottery among them, and fidelity to them.

    python evaluate.py --model smollm2-135m --task arithmetic --personas test --out runs/eval
    python evaluate.py --compare runs/a/evaluation/after runs/b/evaluation/after
    python evaluate.py --check-run runs/a

All personas get the same problems, decoded greedily in one call of the sampler. The sampler, the
chat template and the verifier are those of training. The prompt without a persona, named `none`,
is always asked too. It is the reference: PSS and the other scores are over the P personas alone.

Behind this door, in evaluation/:

    command.py    the flags
    answers.py    sampling that goes on where it was interrupted
    measures.py   the scores and their intervals
    lottery.py    the scores in which the luck of a lottery cancels
    rivals.py     pass@k, the noise floor, and what inference can buy
    fidelity.py   does an answer still tell its persona? No judge is needed
    judge.py      PersonaGym with a judge model; replies.py reads its grades
    compare.py    arms side by side; claims.py: the differences, and what they say
    bands.py      does a training run look right?
    report.py     the HTML page; plots.py draws its plots

Out come `results.json` (the scores and the table of right and wrong, from which any other score can
be computed), `transcripts.jsonl` (the answers), `report.html` and its plots as PNG. All fields are
defined in docs/formats.md.

Left out: multiple choice by log-likelihood, and tasks without one verifiable answer.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import personas as pool
import rewards
import tasks
import weights
from common import files
from common.command import note
from common.ranks import ranks
from evaluation import answers, bands, compare, judge, lottery, measures, report, rivals
from evaluation.command import check, parse
from evaluation.fidelity import Fidelity, fidelity
from evaluation.report import table_text
from rollout import Sampler, SamplingParams

NONE = "none"  # the name of the prompt without a persona in every result


@dataclass(frozen=True)
class EvalParams:
    """How an evaluation samples, and what it measures beside greedy accuracy."""
    seed: int = 0                                       # of sampling and of the bootstrap
    max_new_tokens: int = 32
    samples: int = 0                                    # answers per prompt, for pass@k
    noise_floor: bool = False                           # rerun `none`, once per persona
    temperature: float = 0.7                            # of `samples` and `noise_floor`
    fidelity: Fidelity | None = None
    personagym: judge.PersonaGym | None = None
    reward: str | None = None                           # a user's module:function, see rewards.py
    reward_seconds: float = 30.0                        # time limit of one call of it
    stop: tuple[str, ...] = ()                          # strings that end an answer


def evaluate(sampler, tokenizer, problems, personas, params, out=None, info=None):
    """Accuracy of every persona on the same problems, and what `params` asks for -> results dict.

    sampler: a rollout.Sampler of the model. out: folder for all files. info: what the results
    should carry, such as model, task and method.
    ValueError without problems, or without personas of different names.
    """
    start, n_items, n_personas = time.time(), len(problems), len(personas)
    names = {NONE} | {persona.name for persona in personas}
    if not problems or not personas or len(names) <= n_personas:
        raise ValueError("evaluation needs problems, and personas with different names "
                         f"(none of them '{NONE}')")
    log = answers_file(out)
    greedy = SamplingParams(max_tokens=params.max_new_tokens, temperature=0.0, seed=params.seed,
                            stop=params.stop)
    everyone = [None, *personas]
    rows = ask(sampler, tokenizer, problems, everyone, greedy, log)
    prompts = [pool.prompt_ids(tokenizer, problems[0].question, who) for who in everyone]
    results = {"model": "", "task": "", "method": "", "command": " ".join(sys.argv),
               "commit": files.commit()} | (info or {})
    results |= {"max_new_tokens": params.max_new_tokens, "seed": params.seed,
                "stop": list(greedy.stops(tokenizer)),
                "template": files.digest(tokenizer.batch_decode(prompts))}
    results |= digests(problems, personas)
    table = measures.correct_table(rows, n_items)
    results |= summary(table, problems, personas, params.seed) | measures.totals(rows)
    for row, more in zip(results["personas"], measures.lengths(rows, n_items), strict=True):
        row |= more
    if params.reward and ranks()[0] == 0:               # it may cost: not on every rank
        rewarded(rows, problems, everyone, params)
    if any("reward" in row for row in rows):
        results |= mean_rewards(rows, results["personas"], params.reward or "the task's own scorer")

    sampled, reruns, drawn, spoken = replace(greedy, temperature=params.temperature), [], [], []
    if params.noise_floor:
        reruns = ask(sampler, tokenizer, problems, [None], replace(sampled, n=n_personas), log)
        results["noise_floor"] = rivals.noise_floor(reruns, n_items, params.temperature,
                                                    params.seed)
    if params.samples:
        several = replace(sampled, n=params.samples)
        drawn = ask(sampler, tokenizer, problems, everyone, several, log)
        results["pass_at_k"] = rivals.pass_at_k(drawn, n_items, params.samples,
                                                params.temperature, params.seed)
    reruns = reruns or drawn[:n_items * params.samples]  # the first rows are those of `none`
    results["inference_time_rivals"] = rivals.rivals(rows, reruns, n_personas, params.seed)
    if params.fidelity:
        results["fidelity"], spoken = fidelity(sampler, tokenizer, personas, params.fidelity,
                                               params.seed, log)
    if params.personagym:
        scores = judge.personagym(sampler, tokenizer, params.personagym, params.seed, log)
        results["fidelity"] = results.get("fidelity", {}) | {"personagym": scores}
    results["seconds"] = round(time.time() - start, 2)
    if out is not None:
        write(results, rows + drawn + spoken, out)
        log.unlink()
    return results


# --------------------------------------------------------------------------------------------------
# Ask and grade


def digests(problems, personas):
    """{"problems", "pool"}: by which an evaluation is known to ask the same."""
    return {"problems": files.digest([[one.question, one.answer] for one in problems]),
            "pool": files.digest([[persona.name, persona.text] for persona in personas])}


def answers_file(out):
    """The file in folder `out` that keeps answers until the results are written, None without."""
    if out is None:
        return None
    Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out) / "answers.jsonl.part"


def ask(sampler, tokenizer, problems, personas, params, log=None):
    """Every problem under every persona (None: without), params.n answers each -> graded
    transcripts, persona by persona. params: a SamplingParams."""
    pairs = [(persona, problem) for persona in personas for problem in problems]
    prompts = [pool.prompt_ids(tokenizer, problem.question, persona) for persona, problem in pairs]
    outs = answers.sample(sampler, tokenizer, prompts, params, log)
    rows, verdicts = [], []
    with rewards.Verifier() as verifier:
        for (persona, problem), answered in zip(pairs, outs, strict=True):
            for number, (text, done) in enumerate(answered):
                verdicts.append(verifier.submit(problem.answer, text, problem.question,
                                                getattr(problem, "scorer", "")))
                rows.append({"persona": persona.name if persona else NONE, "id": problem.id,
                             "kind": problem.kind, "question": problem.question,
                             "gold": problem.answer, "answer": text, "sample": number,
                             "temperature": params.temperature, "tokens": len(done.tokens),
                             "truncated": done.truncated, "error": done.error})
    for row, future in zip(rows, verdicts, strict=True):
        verdict = future.result()
        row |= {"correct": verdict.verdict == "correct", "verdict": verdict.verdict,
                "extracted": verdict.extracted.strip()}
        if verdict.score is not None:
            row["reward"] = verdict.score
    return rows


def rewarded(rows, problems, personas, params):
    """Scores greedy transcripts with a user's reward too. params: an EvalParams."""
    asked = [(persona, problem) for persona in personas for problem in problems]
    with rewards.Rewarder(params.reward, params.reward_seconds) as rewarder:
        futures = [rewarder.submit(problem, row["answer"], persona)
                   for row, (persona, problem) in zip(rows, asked, strict=True)]
        for row, future in zip(rows, futures, strict=True):
            row["reward"] = future.result().value


def mean_rewards(rows, by_persona, name):
    """{"reward", "mean_reward"} of transcripts with a `reward`: each row of `by_persona` gets its
    own, and the mean is over the personas, without `none`. One that was late is worth 0."""
    values = np.array([row.get("reward", 0) for row in rows])
    values = values.reshape(len(by_persona), -1).mean(axis=1)
    for row, value in zip(by_persona, values, strict=True):
        row["reward"] = float(value)
    return {"reward": name, "mean_reward": float(values[1:].mean())}


# --------------------------------------------------------------------------------------------------
# Summarise


def summary(table, problems, personas, seed):
    """All measures of one table of right and wrong [N, 1 + P], column 0 without a persona -> dict
    for results.json."""
    n, correct = len(problems), table[:, 1:]
    kinds = np.array([problem.kind for problem in problems])
    rows = []
    speakers = [(NONE, NONE)] + [(persona.name, persona.stratum) for persona in personas]
    for column, (name, stratum) in zip(table.T, speakers, strict=True):
        low, high = measures.wilson(column.sum(), n)
        by_kind = {str(kind): float(column[kinds == kind].mean()) for kind in np.unique(kinds)}
        rows.append({"name": name, "stratum": stratum, "accuracy": float(column.mean()), "n": n,
                     "accuracy_low": low, "accuracy_high": high, "by_kind": by_kind})
    counts = measures.resamples(n, seed=seed)
    values, draws = measures.table_scores(correct), measures.bootstrap(correct, counts, seed)
    values["no_persona_accuracy"] = table[:, 0].mean()
    draws["no_persona_accuracy"] = counts @ table[:, 0] / n
    scores = measures.with_intervals(values, draws) | lottery_scores(correct, personas, seed)
    return {"personas": rows} | scores | {
        "lottery": measures.lottery(correct.mean(axis=0)).tolist(),
        "lottery_held_out": measures.held_out_lottery(correct, seed).tolist() if n > 1 else [],
        "items": [{"id": problem.id, "kind": problem.kind} for problem in problems],
        "correct": {row["name"]: "".join("01"[int(c)] for c in column)
                    for row, column in zip(rows, table.T, strict=True)}}


def lottery_scores(correct, personas, seed):
    """The measures in which luck cancels, with intervals, of one table [N, P].

    None for a measure that needs a larger table, or other personas.
    """
    found = lottery.estimates([correct], [persona.stratum for persona in personas], seed)
    out = dict.fromkeys(lottery.NAMES) | compare.arm_scores(found)
    out |= measures.no_effect([correct], seed)
    names = [persona.name for persona in personas]
    return out | {"pss_without_one": lottery.leave_one_out([correct], names)}


# --------------------------------------------------------------------------------------------------
# Write


def write(results, transcripts, folder):
    """transcripts.jsonl, report.html and its plots; results.json last, so that it says the rest is
    complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in transcripts)
    files.write_atomically(folder / "transcripts.jsonl", lines)
    label = results["method"] or results["model"] or "model"
    metrics = compare.run_of(folder)[1] if results.get("steps") != 0 else []
    report.write({label: results}, [transcripts], folder, {label: metrics} if metrics else {})
    files.write_atomically(folder / "results.json", json.dumps(results, indent=1))


# --------------------------------------------------------------------------------------------------
# The command


def one_arm(args):
    """Evaluate one model as the flags say -> the results dict, written to --out."""
    refuse_others(args)
    run, steps = compare.run_of(args.model)
    trained = run.get("settings", {})  # of the training run that the model lies in
    if steps and (done := steps[-1]["step"] + 1) < trained.get("steps", 0):
        note(f"warning: this model's run has done {done} of {trained['steps']} steps: its model is "
             "of an end before")
    prompt, limit = tasks.usual(args.task)              # unless the run or a flag says other
    prompt = args.prompt or trained.get("prompt", prompt)
    limit = args.max_new_tokens or trained.get("max_new_tokens", limit)
    params = EvalParams(args.seed, limit, args.samples, args.noise_floor, args.temperature,
                        reward=args.reward, reward_seconds=args.reward_seconds,
                        stop=tuple(trained.get("stop", ())))
    if args.reward:                                     # refused before anything is spent
        rewards.Rewarder(args.reward, args.reward_seconds).close()
    personas = pool.load(args.personas, "test")
    if args.trained_on and not tasks.is_file_of(args.task, args.trained_on):
        raise ValueError(f"--trained-on {args.trained_on} is not the file that is asked, "
                         f"{args.task}: leave it out")
    trained_on = tasks.is_file_of(args.task, args.trained_on or trained.get("task"))
    tasks.check_columns(args.columns, args.task)
    columns = args.columns or (trained.get("columns") if trained_on else None)
    problems = tasks.load(args.task, "test", args.seed, args.limit, not trained_on, columns)
    if trained_on and not tasks.is_file_of(args.task, trained.get("eval_task") or args.task):
        note(f"warning: the model was trained on all of {args.task}")
    problems, open_questions = tasks.put(problems, prompt), pool.load_roleplay("test")
    if args.fidelity and len(personas) < 2:
        raise ValueError("--fidelity needs 2 personas")
    if args.fidelity > len(open_questions):
        raise ValueError(f"--fidelity must be at most {len(open_questions)}, not {args.fidelity}")
    sheets = judge.questions(args.personagym) if args.personagym else []
    model, tokenizer = weights.load(args.model, args.dtype, args.device, args.chat_template)
    if limit >= model.c.max_positions:
        raise ValueError(f"--max-new-tokens {limit} leaves no room for a prompt: the model has "
                         f"{model.c.max_positions} positions")
    if args.fidelity:
        start, reader = args.start_model or trained.get("model", args.model), model
        if start != args.model:
            reader = weights.load_beside(start, tokenizer, args.dtype, args.device)
        asked = open_questions[:args.fidelity]
        params = replace(params, fidelity=Fidelity(asked, reader, reader=start))
    if sheets:
        params = replace(params, personagym=personagym_of(args, sheets))
    info = {"model": args.model, "task": args.task, "prompt": prompt, "method": "start",
            "training_seed": None} | compare.arm_of(run)
    if args.method:
        info["method"] = args.method
    note(f"{tasks.counts(args.task, problems)}; {pool.counts(args.personas, personas)}")
    return evaluate(sampler_of(args, model), tokenizer, problems, personas, params, args.out, info)


def refuse_others(args):
    """Raises ValueError where --out holds the evaluation of another model, or on another task."""
    path = Path(args.out, "results.json")
    try:
        before = json.loads(path.read_text())
        other = [f"{key} {before[key]}" for key in ("model", "task")
                 if before[key] != getattr(args, key)
                 and Path(before[key]).resolve() != Path(getattr(args, key)).resolve()]
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
        return
    if other:
        raise ValueError(f"{args.out} holds an evaluation of {other[0]}: give another --out")


def sampler_of(args, model):
    return Sampler(model, args.slots, not args.no_cuda_graphs)


def personagym_of(args, questions):
    """PersonaGym's questions and the judge that the flags name."""
    if args.judge:
        ask_judge = judge.endpoint(args.judge, args.judge_model, args.judge_concurrency,
                                   args.judge_tokens)
    else:
        model, tokenizer = weights.load(args.judge_model, args.dtype, args.device)
        ask_judge = judge.local(sampler_of(args, model), tokenizer, args.judge_tokens)
    return judge.PersonaGym(questions, ask_judge, args.judge_model, Path(args.out),
                            args.judge_price)


def main(argv=None):
    """The command line. A user's mistake is one line on stderr and exit 2, Ctrl-C exit 130."""
    args = parse(argv)
    try:
        check(args)
        if args.check_run:
            print(bands.text(bands.read(Path(args.check_run)), bands.kept()))
        elif args.compare:
            found = compare.folders(args.compare, args.out, args.roles, args.seed, args.looks)
            print(compare.text(found))
        else:
            print(table_text(one_arm(args)))
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
