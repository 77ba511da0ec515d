"""Evaluation scripts, run as `python -m eval.NAME`: flags -> config -> load -> loop -> records."""
