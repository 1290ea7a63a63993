"""The rooms behind evaluate.py, which lists them."""
