"""Gradients of tables as the rows that were read."""
