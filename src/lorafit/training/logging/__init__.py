"""logging: steps, evaluations and events, written one step late so that no step waits."""
