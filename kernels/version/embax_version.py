"""The version of a build: that of embax beside it, or of the source distribution it is built from."""

import re
from pathlib import Path

__all__ = ["dynamic_metadata"]

_HERE = Path(__file__).resolve().parent.parent
# In the repository, embax says its version; a source distribution has its own in the metadata.
_PLACES = (
    (_HERE.parent / "src" / "embax" / "__init__.py", r'^__version__ = "(.+)"$'),
    (_HERE / "PKG-INFO", r"^Version: (.+)$"),
)


def dynamic_metadata(field: str, settings: dict[str, object] | None = None) -> str:
    """Return the version, the one field that is asked for.

    Args:
      field: Its name.
      settings: None are known.

    Returns:
      The version.

    Raises:
      RuntimeError: If neither place has one.
    """
    for path, pattern in _PLACES:
        if field == "version" and path.is_file():
            found = re.search(pattern, path.read_text("utf-8"), re.MULTILINE)
            if found:
                return found[1]
    raise RuntimeError(f"embax-kernels finds no {field} in {[str(path) for path, _ in _PLACES]}.")
