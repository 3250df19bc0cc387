"""What surrounds a run: untrusted files and texts, safe writing, and torch's global switches."""
