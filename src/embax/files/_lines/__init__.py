"""Read and write lines of text: their ends, their layouts and their numbers."""
