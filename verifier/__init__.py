"""What rewards.py decides with. Each file imports only those before it: text, tokens, parse, exact,
value, equal, extract, verdict (which takes the steps), workers (processes that can be killed)."""
