"""A table: its rules, its ids and its rows."""
