"""Formats of vector files."""
