"""Surroundings of a run: untrusted files and texts, safe writing, signals, memory, and torch's global switches."""
