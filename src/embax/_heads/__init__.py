"""Heads: logits of all rows, and losses over all or some rows."""
