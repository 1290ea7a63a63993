"""Behind train.py: settings and checks, AdamW on masters, ranks, checkpoints, the monitor, the anchor, the run."""
