"""Experiments: many runs, of several methods, tasks and seeds, from one file; their tables and plots."""
