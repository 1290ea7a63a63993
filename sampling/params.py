"""How `rollout.generate` samples."""

import math
from dataclasses import dataclass


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
            (self.n < 1, f"n must be at least 1, not {self.n}"),
            (self.max_tokens < 1,
             f"max_tokens (--max-new-tokens) must be at least 1, not {self.max_tokens}"),
            (not 0 <= self.temperature < math.inf,
             f"temperature must be 0 or more, not {self.temperature}"),
            (self.top_k < 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (not 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
            (not 0 <= self.min_p <= 1, f"min_p must be in [0, 1], not {self.min_p}"),
            ("" in self.stop, "a stop string must not be empty: it would end every completion")]
        for wrong, message in checks:
            if wrong:
                raise ValueError(message)
