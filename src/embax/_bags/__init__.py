"""Bags: lists of ids whose rows are pooled into one vector each."""
