"""A table on a mesh: where its rows are, and how they travel."""
