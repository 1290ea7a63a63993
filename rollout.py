"""The sampler: batched, KV-cached generation that returns token ids and their log-probs.

**Continuous batching.** A fixed number of rows decodes together; a finished row leaves at once and a waiting prompt
takes its place. Live rows are kept contiguous (the last row moves into the hole): matmuls run on live rows only.

**A prompt is computed once.** Prompts that open alike (a persona's system message) share one *trunk* in the cache, and
so do the n samples of a prompt; a row holds only what is its own. The cache and the attention to it are in cache.py.

**A sample depends on (seed, key, sample index), not on the batch around it.** Each row draws its uniforms from its own
counter-based stream (Philox) and inverts the CDF; torch's global generator is not touched.

On a CPU in bf16 the weights are rearranged for small batches while a generation runs (`Transformer.reordered_weights`).

Left out: beam search, speculative decoding.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm

import personas
import weights
from common.command import Parser, one_line
from common.files import numbered
from kernels.attention import Tree
from model import Transformer, chunks
from sampling.cache import Cache, Trunk, shared_openings
from sampling.graphs import Graphs

PREFILL_TOKENS = 4096                                   # tokens in one prefill forward
SAMPLE_ROWS = {"cpu": 8}                                # rows of logits drawn from at once: few stay in a CPU's cache


@dataclass
class Completion:
    """tokens include the stop token when one was sampled; after it or a stop string `truncated` is False. logprobs are
    of the distribution sampled from (temperature and filters applied; greedy: of the model itself), model_logprobs of
    the model at temperature 1."""
    index: int                                          # which prompt
    sample: int                                         # which of its n samples
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True
    model_logprobs: list[float] | None = None
    error: str | None = None                            # the row was given up (logits not finite); others go on


@dataclass
class Prompt:
    index: int
    ids: list[int]
    trunk: Trunk                                        # its shared opening; with n > 1, once prefilled, all of it
    hidden: Tensor | None = None                        # [1, H] at its last position: first tokens come from it
    samples: int = 0                                    # how many have started


@dataclass
class Row:
    trunk: Trunk
    hidden: Tensor                                      # the prompt's, for the first token
    out: Completion
    uniforms: np.ndarray                                # one a token


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p=1.0, min_p=0.0):
    """logits [B, V] fp32, uniforms [B] float64 -> (tokens [B], logprobs [B]); NaN where a row is not finite.

    Inverse CDF over blocks of the vocabulary: one pass for the blocks' sums, then 256 entries of one block. Sums of
    sums keep the CDF accurate in fp32 (a running sum over 50k entries would not be).
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    at_once = SAMPLE_ROWS.get(logits.device.type, 512)
    parts = [sample_rows(*rows, temperature, top_k, top_p, min_p) for rows in
             zip(logits.split(at_once), uniforms.split(at_once), strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def sample_rows(logits, uniforms, temperature, top_k, top_p, min_p) -> tuple[Tensor, Tensor]:
    """`sample` for the rows that are drawn at once."""
    if top_k or top_p < 1 or min_p > 0:
        logits = filtered(logits / temperature, top_k, top_p, min_p) * temperature
    B, V = logits.shape
    top = logits.amax(-1, keepdim=True)
    mass = logits.new_zeros(B, -(-V // 256) * 256) if V % 256 else torch.empty_like(logits)
    torch.sub(logits, top, out=mass[:, :V])
    mass[:, :V].mul_(1 / temperature).exp_()
    blocks = mass.view(B, -1, 256)
    cdf = blocks.sum(-1).double().cumsum(-1)                                    # [B, V / 256]
    target = uniforms[:, None] * cdf[:, -1:]
    block = (cdf <= target).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 256))[:, 0].double().cumsum(-1)
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    tokens = (block * 256 + (inside <= rest).sum(-1, keepdim=True)).clamp(max=V - 1)
    logprobs = (logits.gather(1, tokens) - top) / temperature - cdf[:, -1:].log()
    return tokens[:, 0], logprobs[:, 0].float()


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """-inf for what the filters drop: all but the k best; outside the smallest set of mass p (Holtzman et al., arXiv
    1904.09751); below min_p times the best one's probability (arXiv 2407.01082)."""
    logits = logits.clone()
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits[logits < kth] = -torch.inf
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        ordered[probs.cumsum(-1) - probs >= top_p] = -torch.inf
        logits = torch.empty_like(logits).scatter_(1, index, ordered)
    if min_p > 0:
        logits[logits < logits.amax(-1, keepdim=True) + np.log(min_p)] = -torch.inf
    return logits


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def _generate(model: Transformer, prompts: list[list[int]], n: int = 1, max_new_tokens: int = 64,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
             stop_ids=None, stop_strings=(), tokenizer=None, keys: list[int] | None = None, slots: int = 64,
             model_logprobs: bool = False, on_token=None, cuda_graphs: bool = False) -> Iterator[Completion]:
    """Yields the n completions of every prompt as they finish.

    prompts: token ids. keys: one integer a prompt (default: its index); samples are a function of (seed, key, sample).
    stop_ids: default the model's. stop_strings need the tokenizer. slots: rows decoded together, which bounds memory.
    on_token: called with a row's tokens after each new one. cuda_graphs: see graphs.py.
    Raises ValueError, before anything runs, for settings or prompts that cannot work.
    """
    room = model.c.max_positions - max_new_tokens
    wrong = [message for bad, message in [
        (n < 1, f"n must be at least 1, not {n}"),
        (max_new_tokens < 1, f"max_new_tokens must be at least 1, not {max_new_tokens}"),
        (not 0 <= temperature < np.inf, f"temperature must be 0 or more, not {temperature}"),
        (top_k < 0, f"top_k must be 0 (off) or more, not {top_k}"),
        (not 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}"),
        (not 0 <= min_p <= 1, f"min_p must be in [0, 1], not {min_p}"),
        (slots < 1, f"slots must be at least 1, not {slots}"),
        (bool(stop_strings) and tokenizer is None, "stop_strings need the tokenizer")] if bad]
    wrong += [f"prompt {i} is empty" for i, prompt in enumerate(prompts) if not prompt]
    wrong += [f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that exceeds the model's "
              f"{model.c.max_positions} positions" for i, prompt in enumerate(prompts) if len(prompt) > room]
    if wrong:
        raise ValueError(wrong[0])
    stops = set(model.c.stop_ids if stop_ids is None else stop_ids)
    generation = Generation(model, prompts, n, max_new_tokens, seed, keys or range(len(prompts)), slots, model_logprobs,
                            cuda_graphs)

    def draw(logits, uniforms):
        return sample(logits, uniforms, temperature, top_k, top_p, min_p)

    return generation.run(draw, stops, stop_strings, tokenizer, on_token)


@dataclass(frozen=True)
class SamplingParams:
    n: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple = ()


def generate(model, prompts, params=SamplingParams(), max_new_tokens=None, temperature=None, *, keys=None, slots=64, tokenizer=None, on_token=None, cuda_graphs=False, **old):
    if max_new_tokens or old or isinstance(params, int):
        old = old | ({"n": params} if isinstance(params, int) else {}) | ({"max_new_tokens": max_new_tokens} if max_new_tokens else {}) | ({"temperature": temperature} if temperature is not None else {})
        return _generate(model, prompts, keys=keys, slots=slots, tokenizer=tokenizer, on_token=on_token, cuda_graphs=cuda_graphs, **old)
    return _generate(model, prompts, params.n, params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p, params.seed, None, params.stop, tokenizer, keys, slots, False, on_token, cuda_graphs)


class Generation:
    """One call's state: waiting prompts, prefilled prompts with samples still to start, live rows, the cache."""

    def __init__(self, model, prompts, n, max_new_tokens, seed, keys, slots, model_logprobs, cuda_graphs=False):
        self.model, self.n, self.max_new_tokens, self.slots = model, n, max_new_tokens, slots
        self.seed, self.keys, self.model_logprobs = seed, keys, model_logprobs
        trunks = shared_openings(prompts)
        order = sorted(range(len(prompts)), key=lambda i: prompts[i], reverse=True)     # the first one is popped first
        self.waiting = [Prompt(i, prompts[i], trunks[i]) for i in order]
        self.started: list[Prompt] = []
        self.rows: list[Row] = []                       # row i of the cache
        self.cache = Cache(model, slots)
        self.graphs = Graphs(model, self.cache) if cuda_graphs else None

    def run(self, draw, stops: set[int], stop_strings, tokenizer, on_token) -> Iterator[Completion]:
        def ended(out: Completion) -> bool:
            if out.error:
                return True
            text = tokenizer.decode(out.tokens) if stop_strings else ""
            out.truncated = out.tokens[-1] not in stops and not any(s in text for s in stop_strings)
            return not out.truncated or len(out.tokens) == self.max_new_tokens

        with self.model.reordered_weights():
            while self.waiting or self.started or self.rows:
                decoding = len(self.rows)
                if self.slots - decoding >= max(1, self.slots // 8) or not decoding:
                    self.admit()
                self.next_tokens(decoding, draw)
                for row in self.rows if on_token else ():
                    on_token(row.out.tokens)
                finished = [i for i, row in enumerate(self.rows) if ended(row.out)]
                for i in reversed(finished):
                    yield self.retire(i)

    @torch.inference_mode()
    def next_tokens(self, decoding: int, draw) -> None:
        """Draws one token for every row; the first `decoding` rows are decoded, the others have just been prefilled."""
        hidden = [self.decode(decoding)] if decoding else []
        logits = self.model.logits(torch.cat(hidden + [row.hidden for row in self.rows[decoding:]]))
        if logits.device.type == "mps":                 # has no float64, in which the CDF is summed
            logits = logits.cpu()
        uniforms = torch.tensor([row.uniforms[len(row.out.tokens)] for row in self.rows], device=logits.device)
        tokens, logprobs = draw(logits, uniforms)
        plain = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist() if self.model_logprobs else None
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            out = self.rows[i].out
            if not np.isfinite(logprob):
                out.error = f"the model's logits are not finite after {len(out.tokens)} tokens"
                continue
            out.tokens.append(token)
            out.logprobs.append(logprob)
            if plain:
                out.model_logprobs.append(plain[i])

    # -- prompts in, rows out --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self) -> None:
        """Fills the free rows: further samples of prefilled prompts first, then new prompts."""
        free = self.slots - len(self.rows)
        new, planned = [], sum(self.n - p.samples for p in self.started)
        while self.waiting and planned < free:
            new.append(self.waiting.pop())
            planned += self.n
        openings = list({id(p.trunk): p.trunk for p in new if p.trunk.ids and p.trunk.at < 0}.values())
        for first, last in chunks([len(trunk.ids) for trunk in openings], PREFILL_TOKENS):
            self.prefill_openings(openings[first:last])
        for first, last in chunks([len(p.ids) - len(p.trunk.ids) for p in new], PREFILL_TOKENS):
            self.prefill(new[first:last])
        for prompt in self.started:
            while prompt.samples < self.n and len(self.rows) < self.slots:
                self.start(prompt)
        self.started = [p for p in self.started if p.samples < self.n]

    def prefill_openings(self, trunks: list[Trunk]) -> None:
        tree = Tree([len(t.ids) for t in trunks], [[] for _ in trunks], self.model.c, self.model.device, keep=True)
        self.model(self.ids([t.ids for t in trunks]), tree.position_ids, tree)
        end = 0
        for trunk in trunks:
            start, end = end, end + len(trunk.ids)
            self.cache.extend(trunk, Trunk([], 0), tree.kept, slice(start, end))

    def prefill(self, prompts: list[Prompt]) -> None:
        """Runs what the openings do not cover. n = 1: into the row's own cache; n > 1: a trunk of the whole prompt."""
        trunks = list({id(p.trunk): p.trunk for p in prompts}.values())
        members = [[p for p in prompts if p.trunk is t] for t in trunks]
        rest = [[p.ids[len(p.trunk.ids):] for p in row] for row in members]
        tree = Tree([len(t.ids) for t in trunks], [[len(x) for x in row] for row in rest], self.model.c,
                    self.model.device, keep=True, cached=self.cache.reader(trunks))
        hidden = self.model(self.ids([x for row in rest for x in row]), tree.position_ids, tree)
        end = 0
        for prompt in (p for row in members for p in row):
            start, end = end, end + len(prompt.ids) - len(prompt.trunk.ids)
            prompt.hidden = hidden[end - 1:end].clone()
            if self.n == 1:
                self.start(prompt, tree.kept, slice(start, end))
            else:
                opening, prompt.trunk = prompt.trunk, Trunk(prompt.ids, self.n)
                self.cache.extend(prompt.trunk, opening, tree.kept, slice(start, end))
                self.cache.release(opening)
                self.started.append(prompt)

    def start(self, prompt: Prompt, kept: list | None = None, tokens: slice = slice(0, 0)) -> None:
        """A new row for the prompt's next sample, with the prompt tokens that are not in its trunk."""
        self.cache.start_row(len(self.rows), prompt.trunk, kept, tokens)
        counter = [0, 0, prompt.samples, self.keys[prompt.index] % 2**64]
        stream = np.random.Philox(key=self.seed % 2**64, counter=counter)
        out = Completion(prompt.index, prompt.samples, model_logprobs=[] if self.model_logprobs else None)
        self.rows.append(Row(prompt.trunk, prompt.hidden, out, np.random.Generator(stream).random(self.max_new_tokens)))
        prompt.samples += 1

    @torch.inference_mode()
    def retire(self, i: int) -> Completion:
        """Takes row i out; the last row moves into its place."""
        row, last = self.rows[i], self.rows.pop()
        if last is not row:
            self.rows[i] = last
            self.cache.move_row(len(self.rows), i)
        elif row.out.error:
            self.cache.clear(self.cache.row_kv, i)
        self.cache.release(row.trunk)
        return row.out

    def ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor([t for row in rows for t in row], device=self.model.device)

    # -- the decode step -------------------------------------------------------------------------------------------

    def decode(self, count: int) -> Tensor:
        """Feeds the last token of the first `count` rows; returns their hidden states [count, H].

        The batch is rounded up to a multiple of 8 (a new shape may cost the matmul library a new kernel); the rows
        added do not count, and what they write is overwritten before it is read.
        """
        B = min(self.slots, -(-count // 8) * 8)
        tokens = [row.out.tokens[-1] if row.out.tokens else 0 for row in self.rows[:B]]
        tokens = torch.tensor(tokens + [0] * (B - len(tokens)), device=self.model.device)
        position_ids, attend = self.cache.decode_step([row.trunk for row in self.rows[:count]], B)
        hidden = self.graphs(tokens) if self.graphs else self.model(tokens, position_ids, attend)
        self.cache.own[:count] += 1
        return hidden[:count]

# ----------------------------------------------------------------------------------------------------------------------
# Command line: batch sampling, and a chat in the terminal


def parser() -> argparse.ArgumentParser:
    p = Parser(description="Sample completions for a file of prompts, or chat with a persona.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a hub id or a .gguf file")
    p.add_argument("--prompts", help='lines {"prompt"} or {"messages"}; without it: a chat in the terminal')
    p.add_argument("--out", help="where the completions go, one JSON line each (default: stdout)")
    p.add_argument("--persona", help='system message of the chat, e.g. "You are a pirate."')
    p.add_argument("--n", type=int, default=1, help="completions a prompt")
    p.add_argument("--max-new-tokens", type=int, default=128, help="length limit of a completion")
    p.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    p.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: off")
    p.add_argument("--top-p", type=float, default=1.0, help="sample within this probability mass")
    p.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest one's")
    p.add_argument("--stop", action="append", default=[], help="a string that ends a completion; may be repeated")
    p.add_argument("--model-logprobs", action="store_true", help="also the model's own log-probs, at temperature 1")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--slots", type=int, default=64, help="completions decoded together")
    p.add_argument("--dtype", default="auto", choices=["auto", *weights.DTYPES], help="of compute")
    p.add_argument("--device", default="auto", choices=weights.DEVICES, help="auto: the GPU if there is one, else the "
                   "CPU")
    p.add_argument("--cuda-graphs", action="store_true", help="decode steps as CUDA graphs (never run by us)")
    p.add_argument("--progress", action="store_true", help="progress bar even without a terminal")
    return p


def read_prompts(path: str, tokenizer) -> list[list[int]]:
    """Token ids of each line. Raises ValueError naming the line that has neither `prompt` nor `messages`."""
    prompts = []
    for _, where, row in numbered(Path(path), "prompt or messages"):
        try:
            if "messages" not in row and not isinstance(row["prompt"], str):
                raise ValueError("prompt must be a string")
            prompts.append(personas.chat_ids(tokenizer, row["messages"]) if "messages" in row
                           else tokenizer(row["prompt"]).input_ids)
        except Exception as error:                      # whatever is wrong with a line, its number is what helps
            raise ValueError(f'{where}: needs "prompt" or "messages" ({one_line(error)})') from error
    return prompts


def batch(model, tokenizer, args, sampling: dict) -> None:
    prompts = read_prompts(args.prompts, tokenizer)
    done = generate(model, prompts, args.n, slots=args.slots, **sampling)
    with open(args.out, "w", encoding="utf-8") if args.out else nullcontext(sys.stdout) as file:
        for c in tqdm(done, total=len(prompts) * args.n, disable=not (args.progress or sys.stderr.isatty())):
            text = tokenizer.decode(c.tokens, skip_special_tokens=True)
            line = {"index": c.index, "sample": c.sample, "text": text, "tokens": c.tokens, "logprobs": c.logprobs,
                    "truncated": c.truncated}
            extra = {"model_logprobs": c.model_logprobs, "error": c.error}
            print(json.dumps(line | {k: v for k, v in extra.items() if v is not None}), file=file, flush=True)


def chat(model, tokenizer, args, sampling: dict) -> None:
    """Turns from stdin until it ends; tokens are printed as they come."""
    messages = [{"role": "system", "content": args.persona}] if args.persona else []
    print("(end with Ctrl-D)", file=sys.stderr)
    for number, line in enumerate(sys.stdin):
        messages.append({"role": "user", "content": line.strip()})
        prompt = personas.chat_ids(tokenizer, messages)
        shown = ""

        def show(tokens):
            nonlocal shown
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):              # half of a character: wait for the rest
                print(text[len(shown):], end="", flush=True)
                shown = text

        answer = next(generate(model, [prompt], keys=[number], slots=1, on_token=show, **sampling))
        print()
        messages.append({"role": "assistant", "content": tokenizer.decode(answer.tokens, skip_special_tokens=True)})


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.prompts and not Path(args.prompts).is_file():
            raise ValueError(f"no file {args.prompts}")
        if args.persona and args.prompts:
            raise ValueError("--persona is for the chat; in --prompts put it into the messages")
        if not args.prompts and (args.out or args.n != 1):
            raise ValueError("--out and --n need --prompts")
        model, tokenizer = weights.load(args.model, args.dtype, args.device)
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
                    "top_p": args.top_p, "min_p": args.min_p, "seed": args.seed, "stop_strings": args.stop,
                    "tokenizer": tokenizer, "model_logprobs": args.model_logprobs, "cuda_graphs": args.cuda_graphs}
        (batch if args.prompts else chat)(model, tokenizer, args, sampling)
    except (ValueError, OSError, TemplateError) as error:
        print(f"rollout.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
