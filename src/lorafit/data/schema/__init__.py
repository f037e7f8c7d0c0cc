"""Schema: raw rows of any shape become records, one conversation each."""
