"""Defaults that Python functions and the command line share. No imports, so that the command line starts soon."""

# The most words that training counts at a time. A word takes about 150 bytes.
MAX_VOCABULARY = 5_000_000
