"""The program of a gradient, taken apart into rows."""
