"""Sources: files and hub datasets become raw rows, each with its file and line."""
