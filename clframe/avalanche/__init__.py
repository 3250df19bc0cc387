"""Avalanche, both ways: its benchmarks as scenarios, and clframe's plugins in its strategies."""
