import numpy as np
import pytest

from embax import RowGrad, Table
from embax._core.table import with_weight
from embax.optim._states import prepared_gradient

TABLE = Table(np.zeros((3, 2), np.float32), padding_idx=1)
ROWS = RowGrad([0], np.ones((1, 2), np.float32), 3)


@pytest.mark.parametrize("given", [ROWS, with_weight(TABLE, ROWS)], ids=["rows", "table of rows"])
def test_prepared_gradient_is_a_table_of_rows(given):
    prepared = prepared_gradient("call", "w", TABLE, given)
    assert type(prepared) is Table
    assert prepared.padding_idx == 1
    assert type(prepared.weight) is RowGrad


def test_prepared_gradient_of_a_frozen_table_has_no_rows():
    prepared = prepared_gradient("call", "w", Table(TABLE.weight, freeze=True), ROWS)
    assert prepared.weight.values.shape == (0, 2)


def test_prepared_gradient_refuses_rows_of_an_array():
    with pytest.raises(ValueError, match=r"call\(grads=\.\.\.\)` must have a RowGrad for tables only, got one for w"):
        prepared_gradient("call", "w", TABLE.weight, ROWS)
