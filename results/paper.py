"""The paper's setting: chain of thought, MATH-500 under 54 personas, PersonaGym with a judge.

    python results/paper.py --model Qwen/Qwen2.5-1.5B-Instruct --task math \\
        --personagym personagym.jsonl --judge-model Qwen/Qwen3-8B
    python results/paper.py --small --model smollm2-135m --task gsm8k_train.jsonl --eval-task math500.jsonl

It is results/run.py with the flags below. That script's flags and train.py's can be given too, and
win. The arms are those that the paper compares, with and without a KL to the start model; plain
RLVR with paraphrases of the default prompt (is it the personas, or any change of the prompt?); and
ours. `sft` is left out: it would learn golds, which have no reasoning, under a prompt that asks for
it. Personas: the 24 for testing, and 24 that forbid the solver's format beside six ordinary ones. A
judge that fails its planted controls on the start model ends the experiment before any training.

--small is a dry run: the same path on a laptop, with 2 problems a step and 2 steps. Its numbers say
nothing.

What is the paper's and what is ours stands in results/recipes.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from results import run  # noqa: E402

SETTING = {  # flags of run.py, then of train.py
    "--arms": "distill rlvr permix rlvr+kl permix+kl rlvr+paraphrases permix+anchor",
    "--seeds": "0 1 2", "--at": "100 200 300", "--jobs": "1",
    "--task": "gsm8k", "--eval-task": "math500", "--problems": "500",
    "--personas": "test+conflict-test", "--questions": "32", "--name": "paper", "--out": "runs/paper",
    "--prompt": "cot", "--max-new-tokens": "512", "--prompts": "32", "--group-size": "8",
    "--temperature": "1.0", "--learning-rate": "1e-6",
}
SMALL = {
    "--arms": "rlvr permix", "--seeds": "0", "--at": "1 2", "--problems": "4", "--questions": "2",
    "--name": "paper-small", "--out": "runs/paper-small", "--max-new-tokens": "64",
    "--prompts": "2", "--group-size": "4",
}


def flags(argv: list[str]) -> list[str]:
    """Those of results/run.py: the setting's, the small one's where asked, then the user's own."""
    setting = SETTING | (SMALL if "--small" in argv else {})
    told = [part for flag, value in setting.items() for part in (flag, *value.split())]
    return told + [part for part in argv if part != "--small"]


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        setting = "\n    ".join(" ".join(pair) for pair in SETTING.items())
        print(f"{__doc__}\nThe flags:\n\n    {setting}\n\nThose of run.py, with its own defaults:\n")
    sys.exit(run.run(flags(sys.argv[1:])))
