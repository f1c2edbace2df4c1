"""The error that all readers raise for a bad file."""

import os


class FormatError(ValueError):
    """A file cannot be read: it is truncated, corrupt, or in another format.

    Args:
      path: The file.
      reason: What is wrong with it, and where.

    Example:
      >>> import embax.files
      >>> print(embax.files.FormatError("corpus.txt", "byte 7 is not UTF-8."))
      corpus.txt: byte 7 is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{os.fspath(path)}: {reason}")
