"""Behind train.py: settings, masters and ranks, checkpoints, the monitor, the anchor, the run."""
