"""Ways to do the works of the benchmarks by torch and FBGEMM; run by processes.py in an environment of their own.

A step does the same as embax's: it looks up rows, and updates the table with a given gradient. Only this is timed.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from serve import Way, serve, timed
from workload import (
    LEARNING_RATE,
    LENGTH,
    Case,
    Tables,
    batches_of,
    batches_of_tables,
    gradient_of,
    gradient_of_tables,
)

THREADS = 2
TORCH = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=LEARNING_RATE),
    "Adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=LEARNING_RATE),
}
FBGEMM = {"SGD": EmbOptimType.EXACT_SGD, "row-wise Adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
# The pooling, and the ids in a bag: unpooled, as the rows of a sequence are read; as bags of one id, for which it has
# another program; and as bags.
POOLED = {"unpooled": (PoolingMode.NONE, 1), "bags of one": (PoolingMode.SUM, 1), "bags": (PoolingMode.SUM, LENGTH)}


def build(work: str, case: Case | Tables) -> Way:
    """Make a way to do a work: "torch lookup", "torch Adam", "FBGEMM lookup, unpooled", "FBGEMM SGD, bags", ..."""
    library, _, what = work.partition(" ")
    if isinstance(case, Tables):
        return _fbgemm_tables(case)
    ids = [torch.from_numpy(batch).long() for batch in batches_of(case)]
    return timed(ids, _torch(what, case) if library == "torch" else _fbgemm(what, case))


def _torch(what: str, case: Case) -> Callable[[torch.Tensor], Any]:
    if what == "lookup":
        weight = torch.full((case.rows, case.dim), 0.01)
        return lambda ids: torch.nn.functional.embedding(ids, weight)
    if what == "bag":
        weight = torch.full((case.rows, case.dim), 0.01)
        return lambda ids: torch.nn.functional.embedding_bag(ids.view(-1, LENGTH), weight, mode="sum")
    embedding = torch.nn.Embedding(case.rows, case.dim, sparse=True, _weight=torch.full((case.rows, case.dim), 0.01))
    optimizer, gradient = TORCH[what](list(embedding.parameters())), torch.from_numpy(gradient_of(case))

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        embedding(ids).backward(gradient)
        optimizer.step()

    return step


def _fbgemm(what: str, case: Case) -> Callable[[torch.Tensor], Any]:
    optimizer, _, kind = what.partition(", ")
    pooling, length = POOLED[kind]
    tables = _tables([(case.rows, case.dim)], FBGEMM.get(optimizer, EmbOptimType.EXACT_SGD), pooling)
    offsets, gradient = torch.arange(0, case.ids + 1, length), torch.from_numpy(gradient_of(case, length))
    if optimizer not in FBGEMM:

        def forward(ids: torch.Tensor) -> None:
            with torch.no_grad():
                tables(ids, offsets)

        return forward
    return lambda ids: tables(ids, offsets).backward(gradient)


def _fbgemm_tables(case: Tables) -> Way:
    """A step of row-wise Adagrad on many tables in one module."""
    tables = _tables([(case.rows, case.dim)] * case.tables, EmbOptimType.EXACT_ROWWISE_ADAGRAD, PoolingMode.SUM)
    ids = [torch.from_numpy(batch.reshape(-1)).long() for batch in batches_of_tables(case)]
    offsets = torch.arange(case.tables * case.bags + 1)
    by_bag = gradient_of_tables(case).swapaxes(0, 1).reshape(case.bags, -1)
    gradient = torch.from_numpy(by_bag.copy())
    return timed(ids, lambda ids: tables(ids, offsets).backward(gradient))


def _tables(
    sizes: Sequence[tuple[int, int]], optimizer: EmbOptimType, pooling: PoolingMode
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """A module of tables, whose optimizer is part of its backward pass."""
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(*size, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in sizes],
        optimizer=optimizer,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
        pooling_mode=pooling,
        bounds_check_mode=BoundsCheckMode.FATAL,
    )
    for weight in tables.split_embedding_weights():  # which are one page of zeros until they are written
        weight.fill_(0.01)
    return tables


def about() -> dict[str, Any]:
    """Versions and threads."""
    return {
        "torch": torch.__version__,
        "fbgemm": fbgemm_gpu.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    serve(about(), build)
