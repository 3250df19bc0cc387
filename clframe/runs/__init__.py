"""Runs on the disk: the run folder, checkpoints, results, and runs that extend finished ones."""
