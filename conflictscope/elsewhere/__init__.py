"""Measure edited models with the evaluation harnesses that others use: lm-evaluation-harness and Inspect.

They bring the benchmarks, and ask a model: here are the models that they ask (``lm_eval``, ``inspect_ai``), and tasks
that need no network (``tasks``).
"""
