"""Text of files and tokens: arrays of strings, and bytes that are not UTF-8."""
