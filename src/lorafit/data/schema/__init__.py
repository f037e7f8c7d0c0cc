"""Raw rows become records: one conversation each, whatever the file's shape."""
