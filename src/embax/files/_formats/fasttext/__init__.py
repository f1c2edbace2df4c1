"""fastText models, and their n-grams."""
