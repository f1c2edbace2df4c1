"""Sharded tables: which device of a mesh owns which rows, and how rows move between devices."""
