"""Checkpoints: written whole by a thread of their own, proved by a manifest, resumed to the bit."""
