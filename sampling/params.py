"""How `rollout.generate` samples."""

from dataclasses import dataclass

from model import Config
from weights.templates import stop_strings


@dataclass(frozen=True)
class SamplingParams:
    """The settings of `generate`. Raises ValueError for values that cannot work."""
    n: int = 1                                          # completions per prompt
    max_tokens: int = 64                                # length limit of a completion
    temperature: float = 1.0                            # 0: greedy
    top_k: int = 0                                      # among the k likeliest tokens; 0: off
    top_p: float = 1.0                                  # within this probability mass
    min_p: float = 0.0                                  # at least this share of the likeliest's
    seed: int = 0
    stop: tuple[str, ...] = ()                          # strings that end a completion

    def __post_init__(self):
        checks = [
            (self.n < 1, f"--n must be at least 1, not {self.n}"),
            (self.max_tokens < 1,
             f"--max-new-tokens must be at least 1, not {self.max_tokens}"),
            (not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6),    # fp32's range
             f"--temperature must be 0 (greedy) or from 1e-6 to 1e6, not {self.temperature}"),
            (self.top_k < 0, f"--top-k must be 0 (off) or more, not {self.top_k}"),
            (not 0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p}"),
            (not 0 <= self.min_p <= 1, f"--min-p must be in [0, 1], not {self.min_p}"),
            (not 0 <= self.seed <= 10**18, f"--seed must be from 0 to 10^18, not {self.seed}"),
            ("" in self.stop, "--stop must not be empty: it would end every completion")]
        for wrong, message in checks:
            if wrong:
                raise ValueError(message)

    def stops(self, tokenizer) -> tuple[str, ...]:
        """All strings that end a completion: those of `stop` and of the chat template."""
        return (*self.stop, *stop_strings(tokenizer))

    def text(self, tokens: list[int], tokenizer) -> str:
        """What a reader and a reward see of a completion: no special token, no stop string."""
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.stops(tokenizer) if stop in text]
        return text[:min(ends, default=None)]

    def check_prompt(self, name: str, ids: list[int], c: Config) -> None:
        """Raises ValueError, with the prompt's name, where a model of this config can't go on from
        it."""
        if not ids:
            raise ValueError(f"{name} is empty")
        if max(ids) >= c.vocab_size:
            raise ValueError(f"{name} has the token id {max(ids)}, but the model has embeddings "
                             f"for {c.vocab_size} tokens: its tokenizer is another's")
        if len(ids) + self.max_tokens > c.max_positions:
            raise ValueError(
                f"{name} has {len(ids)} tokens; with {self.max_tokens} new ones "
                f"(--max-new-tokens) that exceeds the model's {c.max_positions} positions")
