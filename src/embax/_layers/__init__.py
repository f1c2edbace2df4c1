"""Code that the layers of all frameworks share."""
