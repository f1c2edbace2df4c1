"""What holds a table: pytrees of rows, parameters of frameworks, models and their serialised states."""
