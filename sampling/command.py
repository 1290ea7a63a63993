"""rollout.py's command: its flags, a file of prompts as a batch, a chat in the terminal."""

import argparse
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

import personas
import weights
from common.command import Parser, one_line
from common.files import numbered
from common.ranks import refuse_several
from model import Config
from sampling.params import SamplingParams


def parser() -> argparse.ArgumentParser:
    p = Parser(description="Sample completions for a file of prompts, or chat with a persona.")
    add = p.add_argument
    add("--model", default="smollm2-135m", help="smollm2-135m, a folder, a hub id or a .gguf file")
    add("--chat-template", metavar="FILE",
        help="a Jinja template, or plain: for a base model, which has none")
    add("--prompts", help='lines {"prompt"} or {"messages"}; without it: a chat in the terminal')
    add("--out", help="where the completions go, one JSON line each (default: stdout)")
    add("--persona", type=text, help='system message of the chat, e.g. "You are a pirate."')
    add("--n", type=int, default=1, help="completions per prompt")
    add("--max-new-tokens", type=int, default=128, help="length limit of a completion, in tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: off")
    add("--top-p", type=float, default=1.0, help="sample within this probability mass")
    add("--min-p", type=float, default=0.0,
        help="drop tokens below this share of the likeliest one's")
    add("--stop", action="append", default=[], type=text,
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


def text(value: str) -> str:
    """Raises ValueError, which argparse tells with the flag, for bytes that are not UTF-8."""
    value.encode()
    return value


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what can't work whatever the model is."""
    refuse_several()
    out, prompts = Path(args.out or ""), Path(args.prompts or "")
    checks = [
        ("" in (args.prompts, args.out, args.persona),
         "a flag is empty: give it a value, or leave it out"),
        (args.slots < 0, f"--slots must be 0 (as suits the device) or more, not {args.slots}"),
        (args.n > 10**6, f"--n must be at most a million, not {args.n}"),
        (args.temperature == 0 and args.n > 1,
         "at --temperature 0 all completions of a prompt are the same: leave out --n"),
        (args.temperature == 0 and (args.top_k, args.top_p, args.min_p) != (0, 1, 0),
         "at --temperature 0 --top-k, --top-p and --min-p do nothing: leave them out"),
        (args.prompts and not prompts.is_file(), f"no file {prompts}"),
        (args.prompts and args.persona,
         "--persona is for the chat; in --prompts put it into the messages"),
        (not args.prompts and (args.out or args.n != 1), "--out and --n need --prompts"),
        (args.out and (out.is_dir() or not out.parent.is_dir()),
         f"--out {out} must be a file in a folder that exists"),
        (args.out and out.resolve() == prompts.resolve(),
         "--out would overwrite --prompts: give another file")]
    for wrong, message in checks:
        if wrong:
            raise ValueError(message)


# --------------------------------------------------------------------------------------------------
# A sampler: a rollout.Sampler


def read_prompts(path: str, tokenizer, params: SamplingParams, c: Config) -> list[list[int]]:
    """Token ids of each line. Raises ValueError naming the line that is no prompt for the model."""
    prompts = []
    for _, where, row in numbered(Path(path), "prompt or messages"):
        text, chat = row.get("prompt"), row.get("messages")
        if isinstance(text, str) and chat is None:
            ids = tokenizer(text).input_ids
        elif isinstance(chat, list) and chat and all(map(is_message, chat)) and text is None:
            try:
                ids = personas.chat_ids(tokenizer, chat)
            except ValueError as error:
                raise ValueError(f"{where}: {one_line(error)}") from error
        else:
            raise ValueError(f'{where}: give either {{"prompt": "text"}} or {{"messages": '
                             '[{"role": "user", "content": "text"}]} (text alone, no images)')
        params.check_prompt(f"{where}: the prompt", ids, c)
        prompts.append(ids)
    if not prompts:
        raise ValueError(f"{path} is empty: give lines with prompt or messages")
    return prompts


def is_message(turn) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(x), str) for x in ("role", "content"))


def batch(sampler, tokenizer, params: SamplingParams, args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts, tokenizer, params, sampler.model.c)
    done = sampler.generate(prompts, params, tokenizer=tokenizer)
    silent = not (args.progress or sys.stderr.isatty())
    with open(args.out, "w", encoding="utf-8") if args.out else nullcontext(sys.stdout) as file:
        for c in tqdm(done, total=len(prompts) * params.n, disable=silent):
            text = params.text(c.tokens, tokenizer)
            line = {"index": c.index, "sample": c.sample, "text": text, "tokens": c.tokens,
                    "logprobs": c.logprobs, "truncated": c.truncated}
            if c.error:
                line["error"] = c.error
            print(json.dumps(line), file=file, flush=True)


def chat(sampler, tokenizer, params: SamplingParams, args: argparse.Namespace) -> None:
    """Turns from stdin until it ends; tokens are printed as they come."""
    messages = [{"role": "system", "content": args.persona}] if args.persona else []
    personas.prompt_ids(tokenizer, "Hello", None)       # refused now where there is no template
    begun = [re.escape(stop[:i]) for stop in params.stops(tokenizer) for i in range(1, len(stop))]
    stops = re.compile(rf"(?:{'|'.join(begun) or '(?!)'})$")    # a text that ends within a stop
    print("(end with Ctrl-D)", file=sys.stderr)
    for number, line in enumerate(sys.stdin or ()):     # None where it is closed
        messages.append({"role": "user", "content": line.strip()})
        prompt = personas.chat_ids(tokenizer, messages)
        shown = ""

        def show(tokens):
            nonlocal shown
            text = params.text(tokens, tokenizer)
            if not text.endswith("\ufffd") and not stops.search(text):  # half: wait for the rest
                print(text[len(shown):], end="", flush=True)
                shown = text

        answer = next(sampler.generate([prompt], params, keys=[number], on_token=show,
                                       tokenizer=tokenizer))
        text = params.text(answer.tokens, tokenizer)
        print(text[len(shown):])
        messages.append({"role": "assistant", "content": text})
