"""Several tables together: collections, hashing, compositional tables."""
