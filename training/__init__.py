"""Behind train.py: settings, AdamW, ranks, checkpoints, the monitor, the anchor, the run."""
