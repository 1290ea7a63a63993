"""The arms of an experiment, as flags of train.py."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import personas  # noqa: E402

ARMS = {
    "sft": ["--method", "sft"],
    "distill": ["--method", "distill"],
    "rlvr": ["--method", "rlvr"],
    "permix": ["--method", "permix"],
    "permix+anchor": ["--method", "permix", "--anchor-coef", "0.5"],
}
ABLATIONS = {
    "rlvr+anchor": ["--method", "rlvr", "--anchor-coef", "0.5"],
    "rlvr+rehearsal": ["--method", "rlvr", "--anchor-coef", "0.5", "--anchor-on", "solved"],     # DPH-RL
    "permix+rehearsal": ["--method", "permix", "--anchor-coef", "0.5", "--anchor-on", "solved"],
    "permix+anchor-ce": ["--method", "permix", "--anchor-coef", "0.5", "--anchor-loss", "ce"],
    "rlvr+kl": ["--method", "rlvr", "--kl-coef", "0.03"],
    "permix+kl": ["--method", "permix", "--kl-coef", "0.03"],
    "rlvr+paraphrases": ["--method", "permix", "--personas", "paraphrases-train"],      # prompts vary, nobody speaks
    "permix+anchor, 1 a step": ["--method", "permix", "--anchor-coef", "0.5", "--anchor-count", "1"],
    **{f"rho={rho}": ["--method", "permix", "--persona-prob", rho] for rho in ("0.25", "0.5", "0.75", "1.0")},
    "per rollout": ["--method", "permix", "--mix", "rollout"],
    **{f"kl={beta}": ["--method", "permix", "--kl-coef", beta] for beta in ("0.03", "0.1")},
    **{f"personas={n}": ["--method", "permix", "--personas", n] for n in ("1", "4", "16", "64")},
    **{f"lora={rank}": ["--method", "permix", "--lora-rank", rank] for rank in ("1", "8", "16", "64")},
    "adamw8bit": ["--method", "permix", "--optimizer", "adamw8bit"],
}
EVERY = ARMS | ABLATIONS


def parts(arm: str) -> tuple[list[str], str | None]:
    """(an arm's flags without its training pool, that pool: as train.py has it, or a number of personas; None)."""
    own = EVERY[arm]
    if "--personas" not in own:
        return own, None
    at = own.index("--personas")
    return own[:at] + own[at + 2:], own[at + 1]


def flags(arm: str, out: Path) -> list[str]:
    """Those of train.py for an arm; a number of personas becomes a file of as many in `out`, evenly from the strata."""
    own, pool = parts(arm)
    if pool and pool.isdigit():
        file = out / f"{pool}-personas.jsonl"
        chosen = personas.few(personas.load("train"), int(pool))
        file.write_text("".join(json.dumps(vars(persona)) + "\n" for persona in chosen))
        pool = str(file)
    return [*own, "--personas", pool] if pool else own
