"""Surroundings of a run: untrusted files and texts, safe writing, signals, and torch's global switches."""
