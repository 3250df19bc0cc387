"""Experiments: many runs as one unit of work, and what their figures can show.

A study compares methods over seeds, class orders and scenarios. Nothing here is imported by a single run, and
importing this package imports neither torch nor scipy.
"""
