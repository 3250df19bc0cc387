"""Runs on the disk: run folders, checkpoints, results, and the extension of finished runs."""
