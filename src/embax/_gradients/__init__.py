"""Gradients of tables: only the rows that were read, not an array of all rows."""
