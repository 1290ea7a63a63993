"""Tasks made from a seed: each is a function (split, seed, limit) -> rows for tasks.Problem, which
are (question, answer, id, kind, level). tasks.GENERATED names them."""
