"""The flags of rollout.py."""

import argparse

import weights
from common.command import Parser


def parser() -> argparse.ArgumentParser:
    p = Parser(description="Sample completions for a file of prompts, or chat with a persona.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", default="smollm2-135m", help="smollm2-135m, a folder, a hub id or a .gguf file")
    add("--prompts", help='lines {"prompt"} or {"messages"}; without it: a chat in the terminal')
    add("--out", help="where the completions go, one JSON line each (default: stdout)")
    add("--persona", help='system message of the chat, e.g. "You are a pirate."')
    add("--n", type=int, default=1, help="completions per prompt")
    add("--max-new-tokens", type=int, default=128, help="length limit of a completion, in tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: off")
    add("--top-p", type=float, default=1.0, help="sample within this probability mass")
    add("--min-p", type=float, default=0.0,
        help="drop tokens below this share of the likeliest one's")
    add("--stop", action="append", default=[],
        help="a string that ends a completion; may be repeated")
    add("--seed", type=int, default=0)
    add("--slots", type=int, default=0,
        help="completions decoded together; 0: as suits the device")
    add("--dtype", default="auto", choices=["auto", *weights.DTYPES], help="of compute")
    add("--device", default="auto", choices=weights.DEVICES,
        help="auto: the GPU if there is one, else the CPU")
    add("--no-cuda-graphs", action="store_true",
        help="on a GPU: decode step by step, without recording")
    add("--progress", action="store_true", help="progress bar even without a terminal")
    return p
