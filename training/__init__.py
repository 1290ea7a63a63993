"""Behind train.py: settings, masters and ranks, checkpoints, what a run says of itself, the anchor."""
