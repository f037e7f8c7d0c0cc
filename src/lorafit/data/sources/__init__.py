"""Files and hub data sets become raw rows: found, unpacked, read, each with its file and line."""
