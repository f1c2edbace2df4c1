"""The error of every reader: a file that is not what it should be."""

import os


class FormatError(ValueError):
    """A file that cannot be read as its format: truncated, corrupt, or of another kind.

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
