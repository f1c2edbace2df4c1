"""Bags of ids, pooled."""
