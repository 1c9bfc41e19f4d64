"""Closed-loop evaluation: policies act in environments, on explicit seeds, and are counted exactly."""
