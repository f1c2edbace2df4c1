"""Helpers of all other packages: argument checks, dtypes, mesh layouts, distinct ids, strings. Imports none of them."""
