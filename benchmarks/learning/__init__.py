"""The experiment record: which settings learn fastest and forget least on the demonstration model.

`python -m benchmarks.learning` runs what is missing in docs/experiments/results.jsonl and writes docs/experiments.md.
"""
