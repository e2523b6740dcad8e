"""How accurate a model stays when its pictures are pruned, measured through the server on the real engine.

`vtprune eval` asks a server about scenes whose answers are known (`questions.py`), once for every way of pruning
(`arms.py`), and keeps every answer (`answers.py`). From those come the tables and plots (`results.py`, `report.py`).
Adaptive budgets are compared with fixed ones at equal mean tokens (`thresholds.py`). `ablations.py` holds the rows of
the papers' ablation tables, `in_llm/` the methods that prune inside the language model, which no engine with a paged
cache can serve, and which run in plain transformers.
"""
