"""The analysis of a gradient's program: where it only adds rows to zeros, it is run so that the rows come out.

Read in this order: `rows` (a term), `forms` (what each variable is a sum of), `linear` and `parts` (the rules for each
primitive), `program` (decides what to run, and runs it), `calls` (programs inside of equations).
"""
