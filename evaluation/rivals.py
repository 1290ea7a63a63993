"""What can be had at inference instead of training: sampled reruns, votes, a search for a persona.

The noise floor is the lottery without personas: one prompt, sampled several times. Every rival is
charged for the tokens that it generates.
"""

import numpy as np

from evaluation import measures


def noise_floor(reruns, n_items, temperature, seed):
    """The scores over sampled reruns of the same prompt: a lottery without any persona effect."""
    table = np.array([row["correct"] for row in reruns], dtype=float).reshape(n_items, -1)
    draws = measures.bootstrap(table, measures.resamples(n_items, seed=seed), seed)
    return measures.with_intervals(measures.table_scores(table), draws) | {
        "temperature": temperature, "reruns": table.shape[1],
        "lottery": measures.lottery(table.mean(axis=0)).tolist()}


def pass_at_k(rows, n_items, n, temperature, seed):
    """pass@k for k = 1, 2, 4 ... n, with intervals over items -> {"n", "temperature", "k"}.

    rows: n answers a prompt, first without persona (`none`), then for each persona (`personas` is
    the mean over them).
    """
    hits = np.array([row["correct"] for row in rows]).reshape(-1, n_items, n).sum(axis=2)
    counts, out = measures.resamples(n_items, seed=seed), {}
    for k in sorted({min(2**j, n) for j in range(n.bit_length() + 1)}):
        chance = np.array([measures.pass_at_k(h, n, k) for h in range(n + 1)])[hits]  # [1 + P, N]
        columns = {"none": chance[0], "personas": chance[1:].mean(axis=0)}
        out[str(k)] = measures.with_intervals(
            {name: column.mean() for name, column in columns.items()},
            {name: counts @ column / n_items for name, column in columns.items()})
    return {"n": n, "temperature": temperature, "k": out}


def rivals(rows, reruns, n_personas, seed):
    """[{"name", "accuracy", "tokens_per_item"}] of what one may do at inference.

    The greedy `rows`, those without persona first, give the search for a persona and the vote over
    personas. The search is scored on items that it did not pick with, and pays for the picking.
    The sampled `reruns` without persona give the vote over samples.
    """
    n_items = len(rows) // (1 + n_personas)
    table = measures.correct_table(rows, n_items)
    tokens = np.array([row["tokens"] for row in rows]).reshape(-1, n_items)
    cost = tokens.mean(axis=1)                          # tokens an answer, by persona
    each = cost[1:].mean()
    out = [("no persona", table[:, 0].mean(), cost[0]),
           ("a persona at random", table[:, 1:].mean(), each)]
    if n_items > 1:
        kept = measures.held_out_lottery(table[:, 1:], seed)
        half = n_items // 2
        picking = half / (n_items - half) * each        # of one persona, for each item kept
        for k in sorted({2, 4, 8, 16, n_personas}):
            if k <= n_personas:
                out.append((f"best of {k} personas, picked on a held-out half", kept[k - 1],
                            k * picking + each))
    out.append((f"majority of {n_personas} personas", measures.majority(rows[n_items:]),
                cost[1:].sum()))
    if reruns:
        out.append((f"majority of {len(reruns) // n_items} samples without persona",
                    measures.majority(reruns), sum(row["tokens"] for row in reruns) / n_items))
    return [{"name": name, "accuracy": float(accuracy), "tokens_per_item": float(spent)}
            for name, accuracy, spent in out]
