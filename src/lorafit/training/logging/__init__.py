"""Logging: steps, evaluations and events, written one step late so that nothing waits for a GPU."""
