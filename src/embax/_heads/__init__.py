"""Heads that multiply vectors by rows: logits and losses."""
