"""The formats of vector files, one module or package for each."""
