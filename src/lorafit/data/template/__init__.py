"""Chat templates: rendered in a bounded child, masked, and proved on golden prompts."""
