"""What rewards.py decides with: text -> parse -> value -> equal, each importing only those before it; extract; and
verdict, which takes the steps."""
