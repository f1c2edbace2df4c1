"""Files, streams and archives, opened and written safely."""
