"""Figures with matplotlib, which is an extra."""
