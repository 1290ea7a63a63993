"""Behind rollout.py: the cache, CUDA graphs."""
