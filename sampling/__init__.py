"""Behind rollout.py: the cache, the draw, CUDA graphs."""
