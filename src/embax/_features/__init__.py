"""Several tables together: collections, stacks, hashing."""
