"""What rewards.py decides with: text -> parse -> value -> equal, each importing only those before it, and extract."""
