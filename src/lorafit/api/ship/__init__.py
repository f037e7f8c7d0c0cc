"""ship: the command that exports a run, and the proof of an export in the programs that serve it."""
