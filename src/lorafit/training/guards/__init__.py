"""guards: reactions to memory that runs out and to bad numbers."""
