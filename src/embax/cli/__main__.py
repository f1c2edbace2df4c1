"""`python -m embax.cli`."""

from ._main import main

main()
