"""Read and write fastText models, and compute the vectors of words from their n-grams."""
