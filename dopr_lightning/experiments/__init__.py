"""Experiments: many runs, one table, one plot."""
