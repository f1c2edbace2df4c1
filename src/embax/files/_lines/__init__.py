"""Lines of text: their ends, layouts and numbers."""
