"""What would only be found at some step is looked for before the first one."""

import personas
import tasks
from model import Transformer
from rewards import CORRECTNESS
from verifier.verdict import gold_kind


def check_weights(name: str, model: Transformer) -> None:
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"the weights of {name} are not all finite: it is broken, "
                         "take another copy")


def check(job) -> None:
    """Raises ValueError for what would only be found at some step: prompts that are too long, golds
    that nothing matches, a reward of the user's that fails on its first call.

    job: a training.run.Job.
    """
    args, speakers = job.args, job.pool if job.args.persona_prob else []
    check_room(job, job.problems, speakers, "max_new_tokens")
    if job.held_out:
        check_room(job, *job.held_out, "max_new_tokens")
    if args.anchor_coef and args.anchor_on == "roleplay":
        questions = [tasks.Problem(text, "", repr(text), "")
                     for text in personas.load_roleplay("train")]
        check_room(job, questions, job.pool, "anchor_tokens")
    if args.reward != CORRECTNESS:
        first = job.problems[0]
        job.rewarder.submit(first, first.answer, speakers[0] if speakers else None).result()
    elif all(not p.scorer and gold_kind(p.answer)[0] == "unreadable" for p in job.problems):
        raise ValueError(f"no answer to {args.task} can be correct: none of its golds can be read, "
                         f"like {job.problems[0].answer[:60]!r} of problem {job.problems[0].id}")


def check_room(job, problems: list, speakers: list, limit: str) -> None:
    """Raises ValueError where a question under the longest persona leaves no room for an answer.

    limit: the setting that says how long an answer may be.
    """
    persona = max(speakers, key=lambda p: len(p.text), default=None)
    new_tokens, positions = getattr(job.args, limit), job.model.c.max_positions
    around = len(personas.prompt_ids(job.tokenizer, "", persona))
    times = personas.times_shown(job.tokenizer)
    for problem in problems:
        if around + times * len(problem.question.encode()) + new_tokens <= positions:
            continue                                    # a token is at least a byte
        count = len(personas.prompt_ids(job.tokenizer, problem.question, persona))
        if count + new_tokens > positions:
            raise ValueError(f"the prompt of problem {problem.id} has up to {count} tokens; with "
                             f"--{limit.replace('_', '-')} {new_tokens} that exceeds the model's "
                             f"{positions} positions: shorten either")
