"""Training in the tests: XLA compiles its program at the level of the tests."""

import pytest

from embax.train._engines import xla as _xla


@pytest.fixture(autouse=True)
def options_of_users(monkeypatch):
    """The program with the compiler's options that users on a CPU have; tests run it without them."""
    program = _xla.train
    monkeypatch.setattr(_xla, "train", _xla.train_elsewhere)
    return program
