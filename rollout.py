"""The sampler: batched, KV-cached generation that returns token ids and their log-probs.

**Continuous batching.** A fixed number of rows decodes together. A finished row leaves at once and
a waiting prompt takes its place. Live rows stay contiguous: the last one moves into the hole.

**A prompt is computed once.** Prompts that open alike (a persona's system message) share one
*prefix* in the cache, and so do the n samples of a prompt. See sampling/cache.py.

**A sample depends on (seed, key, sample index), not on the batch around it** (but for the rounding
of its matmuls, which in half precision may turn a near tie). Each row has its own counter-based
stream of uniform numbers (Philox). See sampling/draw.py.

On a CPU in bf16 a generation runs on rearranged weights (`Transformer.reorder`).

Left out: beam search, speculative decoding.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

import weights
from common.command import one_line
from kernels.decode_attention import Rows
from model import Transformer, chunks
from sampling.cache import Cache, KeyValues, Prefix, shared_openings, slots_for
from sampling.command import batch, chat, check, parser
from sampling.draw import sample
from sampling.graphs import Graphs, bucket
from sampling.params import SamplingParams

PREFILL_TOKENS = 4096                                   # tokens in one prefill forward


@dataclass
class Completion:
    """tokens include the stop token when one was sampled. logprobs are of the distribution sampled
    from: temperature and filters applied; greedy: of the model itself."""
    index: int                                          # which prompt
    sample: int                                         # which of its n samples
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True                              # see Generation.finish_reason
    error: str | None = None                            # given up: logits not finite


@dataclass
class Prompt:
    index: int
    ids: list[int]
    prefix: Prefix                                      # what its rows start on
    hidden: Tensor | None = None                        # [1, H] at its last token, from prefill
    samples: int = 0                                    # how many have started


@dataclass
class Row:
    prompt: Prompt
    completion: Completion
    uniforms: np.ndarray                                # [max_tokens] float64, one per token
    entry: int                                          # in the cache
    start: int                                          # prompt tokens in it, behind the prefix


class Sampler:
    """A model, with a cache and CUDA graphs that live as long as it does.

    slots: rows decoded together, which bounds memory; 0: as suits the device and the first call's
    longest row. cuda_graphs: on a GPU, replay decode steps (sampling/graphs.py).
    """

    def __init__(self, model: Transformer, slots: int = 0, cuda_graphs: bool = True):
        if slots < 0:
            raise ValueError(f"--slots must be 0 (as suits the device) or more, not {slots}")
        self.model, self.slots, self.cache = model, slots, Cache(model)
        self.graphs = Graphs(self.cache) if cuda_graphs and model.device.type == "cuda" else None
        self.calls = 0                                  # the last one has the cache

    def generate(self, prompts: list[list[int]], params: SamplingParams = SamplingParams(), *,
                 keys: Sequence[int] | None = None, tokenizer=None, on_token=None,
                 ) -> Iterator[Completion]:
        """Yields the n completions of every prompt as they finish. One call at a time.

        prompts: token ids. keys: one integer per prompt (default: its index); a sample is a
        function of (seed, key, sample index). tokenizer: for stop strings, its chat template's
        too. on_token: called with a row's tokens after each new one. Raises ValueError, before
        anything runs, for what cannot work.
        """
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need the tokenizer")
        for i, prompt in enumerate(prompts):
            params.check_prompt(f"prompt {i}", prompt, self.model.c)
        longest = max(map(len, prompts), default=0) + params.max_tokens
        self.slots = self.slots or slots_for(self.model, longest)
        keys = keys or range(len(prompts))
        return Generation(self, prompts, params, keys, tokenizer).run(on_token)

    def step(self, inputs: Tensor, widths: tuple[int, int] | None = None) -> Tensor:
        """The hidden states [B, H] of one new token in each row.

        inputs [5, B] int32: the tokens, then what kernels.decode_attention.Rows names. widths: as
        for Cache.decode_step.
        """
        tokens, *rows = inputs
        return self.model(tokens, *self.cache.decode_step(Rows(*rows), widths))


def generate(model: Transformer, prompts, params: SamplingParams = SamplingParams(), *,
             slots: int = 0, **more) -> Iterator[Completion]:
    """Sampler.generate with a cache for this call alone."""
    return Sampler(model, slots).generate(prompts, params, **more)


class Generation:
    """One call's state: waiting prompts, prefilled ones with samples to start, live rows."""

    def __init__(self, sampler: Sampler, prompts, params: SamplingParams, keys, tokenizer):
        self.sampler, self.model, self.cache = sampler, sampler.model, sampler.cache
        self.params, self.keys, self.slots = params, keys, sampler.slots
        self.tokenizer, self.stop_ids = tokenizer, set(self.model.c.stop_ids)
        self.stops = params.stops(tokenizer)            # strings
        self.tail = 8 + max((len(stop.encode()) for stop in self.stops), default=0)
        prefixes = shared_openings(prompts)
        order = sorted(range(len(prompts)), key=lambda i: prompts[i], reverse=True)
        self.waiting = [Prompt(i, prompts[i], prefixes[i]) for i in order]      # the last is next
        self.prefilled: list[Prompt] = []
        self.rows: list[Row] = []

    def reserve(self) -> None:
        """Empties the cache, and makes room for the longest row and the longest prefix."""
        n, openings = self.params.n, {p.prefix for p in self.waiting if p.prefix.ids}
        own = shared = 0
        rows = min(self.slots, n * len(self.waiting))
        prefixes = len(openings) + (rows // n if n > 1 else 0)
        for p in self.waiting:
            prompt, opening = len(p.ids), len(p.prefix.ids)
            own = max(own, prompt - opening if n == 1 else 0)           # tokens in the row's entry
            shared = max(shared, opening if n == 1 else prompt)         # in the prefix's
        for kv in (self.cache.row_kv, self.cache.prefix_kv):
            kv.free = list(range(kv.entries))
        self.cache.row_kv.reserve(rows + 1, own + self.params.max_tokens)
        self.cache.prefix_kv.reserve(min(prefixes, rows) + 1, shared)
        self.call = self.sampler.calls = self.sampler.calls + 1
        self.cache.spare = self.cache.row_kv.take()     # for what fills a batch up

    def run(self, on_token=None) -> Iterator[Completion]:
        self.reserve()
        copies = self.model.reorder()
        while self.waiting or self.prefilled or self.rows:
            if self.sampler.calls != self.call:
                raise RuntimeError("another call of this Sampler took its cache")
            decoding = len(self.rows)
            with self.model.reordered_weights(copies):
                # Several prompts are prefilled together: a forward for one would be wasted.
                if self.slots - decoding >= max(1, self.slots // 8) or not decoding:
                    self.admit()
                self.next_tokens(decoding)
            for row in self.rows if on_token else ():
                on_token(row.completion.tokens)
            finished = []               # handed out together: then another call may take the cache
            for i in reversed(range(len(self.rows))):           # a row that moves has been asked
                if reason := self.finish_reason(self.rows[i].completion):
                    finished.append(self.retire(i, reason))
            yield from finished

    def finish_reason(self, completion: Completion) -> str | None:
        """The stopping rule, asked after every token: why a completion is over, None if it is not.

        "stop": with a stop token, or a stop string in its text. Only then `truncated` is False.
        "length": at max_tokens. "error": its logits were not finite.
        """
        if completion.error:
            return "error"
        if completion.tokens[-1] in self.stop_ids:
            return "stop"
        if self.stops:
            # Each token is a byte at least, so that a stop string that ends now is in the last few.
            text = self.tokenizer.decode(completion.tokens[-self.tail:])
            if any(string in text for string in self.stops):
                return "stop"
        return "length" if len(completion.tokens) == self.params.max_tokens else None

    # -- prompts in, rows out ----------------------------------------------------------------------

    @torch.inference_mode()
    def admit(self) -> None:
        """Fills the free rows: further samples of prefilled prompts first, then new prompts."""
        n, free = self.params.n, self.slots - len(self.rows)
        new, planned = [], sum(n - prompt.samples for prompt in self.prefilled)
        while self.waiting and planned < free:
            new.append(self.waiting.pop())
            planned += n
        openings = list(dict.fromkeys(
            prompt.prefix for prompt in new if prompt.prefix.ids and prompt.prefix.entry < 0))
        for first, last in chunks([len(opening.ids) for opening in openings], PREFILL_TOKENS):
            self.prefill_prefixes(openings[first:last])
        lengths = [len(prompt.ids) - len(prompt.prefix.ids) for prompt in new]
        for first, last in chunks(lengths, PREFILL_TOKENS):
            self.prefill_prompts(new[first:last])
        first = len(self.rows)
        for prompt in self.prefilled:
            while prompt.samples < n and len(self.rows) < self.slots:
                self.start_row(prompt, 0)
        self.cache.start([(row.prompt.prefix.entry, row.entry) for row in self.rows[first:]])
        self.prefilled = [prompt for prompt in self.prefilled if prompt.samples < n]

    def prefill_prefixes(self, prefixes: list[Prefix]) -> None:
        nothing = Prefix([], 0)
        for prefix in prefixes:
            self.cache.add_prefix(prefix, nothing)
        self.prefill([nothing] * len(prefixes), [prefix.ids for prefix in prefixes],
                     self.cache.prefix_kv, [(prefix.entry, 0) for prefix in prefixes])

    def prefill_prompts(self, prompts: list[Prompt]) -> None:
        """Computes what the shared openings do not cover. With n = 1 it belongs to the row that
        starts; with n > 1 the whole prompt becomes the prefix of its rows."""
        openings = [prompt.prefix for prompt in prompts]
        rest = [prompt.ids[len(prompt.prefix.ids):] for prompt in prompts]
        if self.params.n == 1:
            kv, places = self.cache.row_kv, [(self.start_row(prompt, len(ids)).entry, 0)
                                             for prompt, ids in zip(prompts, rest, strict=True)]
        else:
            kv, places = self.cache.prefix_kv, []
            for prompt, opening in zip(prompts, openings, strict=True):
                prompt.prefix = Prefix(prompt.ids, self.params.n)
                self.cache.add_prefix(prompt.prefix, opening)
                places.append((prompt.prefix.entry, len(opening.ids)))
            self.prefilled += prompts
        hidden = self.prefill(openings, rest, kv, places)
        for prompt, end in zip(prompts, accumulate(map(len, rest)), strict=True):
            prompt.hidden = hidden[end - 1:end].clone()
        if self.params.n > 1:
            for opening in openings:
                self.cache.release(opening)

    def prefill(self, prefixes: list[Prefix], runs: list[list[int]], kv: KeyValues,
                places: list[tuple[int, int]]) -> Tensor:
        """One forward over runs of tokens, each behind its prefix: hidden states [N, H]."""
        ids = torch.tensor([token for run in runs for token in run], device=self.model.device)
        lengths = [len(run) for run in runs]
        return self.model(ids, *self.cache.prefill_step(prefixes, lengths, kv, places))

    def start_row(self, prompt: Prompt, own_tokens: int) -> Row:
        """Starts the prompt's next sample; own_tokens: how many of the prompt its entry holds."""
        counter = [0, 0, prompt.samples, self.keys[prompt.index] % 2**64]
        stream = np.random.Philox(key=self.params.seed % 2**64, counter=counter)
        uniforms = np.random.Generator(stream).random(self.params.max_tokens)
        self.rows.append(Row(prompt, Completion(prompt.index, prompt.samples), uniforms,
                             self.cache.row_kv.take(), own_tokens))
        prompt.samples += 1
        return self.rows[-1]

    def retire(self, i: int, reason: str) -> Completion:
        """Takes row i out; the last row moves into its place."""
        row, last = self.rows[i], self.rows.pop()
        if last is not row:
            self.rows[i] = last
        row.completion.truncated = reason != "stop"
        self.cache.row_kv.free.append(row.entry)
        self.cache.release(row.prompt.prefix)
        return row.completion

    # -- a token for every row ---------------------------------------------------------------------

    @torch.inference_mode()
    def next_tokens(self, decoding: int) -> None:
        """The first `decoding` rows are decoded; the others have just been prefilled."""
        hidden = [self.decode(decoding)] if decoding else []
        hidden += [row.prompt.hidden for row in self.rows[decoding:]]
        logits = self.model.logits(torch.cat(hidden))
        if logits.device.type == "mps":                 # has no float64, in which the CDF is summed
            logits = logits.cpu()
        uniforms = torch.tensor([row.uniforms[len(row.completion.tokens)] for row in self.rows])
        if logits.is_cuda:              # from pinned memory the copy queues, and nobody waits here
            uniforms = uniforms.pin_memory().to(logits.device, non_blocking=True)
        p = self.params
        tokens, logprobs = sample(logits, uniforms, p.temperature, p.top_k, p.top_p, p.min_p)
        drawn = zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True)
        for row, token, logprob in drawn:
            out = row.completion
            if math.isfinite(logprob):
                out.tokens.append(token)
                out.logprobs.append(logprob)
            else:
                out.error = f"the model's logits are not finite after {len(out.tokens)} tokens"

    def decode(self, count: int) -> Tensor:
        """Feeds the last token of the first `count` rows; returns their hidden states [count, H].

        The batch is filled up with rows that write into an entry of their own.
        """
        inputs = []
        for row in self.rows[:count]:
            tokens, prefix = row.completion.tokens, row.prompt.prefix
            inputs.append((tokens[-1], row.entry, row.start + len(tokens) - 1, max(prefix.entry, 0),
                           len(prefix.ids)))
        inputs += [(0, self.cache.spare, 0, 0, 0)] * (bucket(count) - count)
        inputs = np.array(inputs, np.int32).T.copy()    # torch would take 3 times as long over them
        widths = int(inputs[2].max()) + 1, int(inputs[4].max())         # of lengths, new ones too
        inputs, sampler = torch.from_numpy(inputs).to(self.model.device), self.sampler
        hidden = (sampler.graphs(sampler.step, inputs) if sampler.graphs else
                  sampler.step(inputs, widths))
        return hidden[:count]


# --------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check(args)
        params = SamplingParams(args.n, args.max_new_tokens, args.temperature, args.top_k,
                                args.top_p, args.min_p, args.seed, tuple(args.stop))
        model, tokenizer = weights.load(args.model, args.dtype, args.device, args.chat_template)
        sampler = Sampler(model, args.slots, not args.no_cuda_graphs)
        (batch if args.prompts else chat)(sampler, tokenizer, params, args)
    except (ValueError, OSError) as error:
        print(f"rollout.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
