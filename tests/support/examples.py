"""The programs of the examples folder, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    """Load a program by its path in the folder, without the ending, as a module."""
    if str(EXAMPLES) not in sys.path:  # so that it can import modules beside it
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(Path(name).name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
