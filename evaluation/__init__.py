"""Evaluates models on benchmarks with lm-evaluation-harness (`kvdistill eval`)."""
