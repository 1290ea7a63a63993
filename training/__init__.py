"""Behind train.py: settings, checks, AdamW, ranks, checkpoints, the monitor, the anchor, the run."""
