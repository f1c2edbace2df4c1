"""What every other package leans on: checks, dtypes, meshes, distinct ids, text."""
