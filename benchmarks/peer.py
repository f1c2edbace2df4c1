"""Steps of torch and FBGEMM, run in an environment of their own; benchmarks/row_sparse.py asks by lines of JSON.

A step is what ours is: look up, take the gradient of the rows as given, change the table. Only that is timed.
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from workload import BAGS, DIM, IDS, LEARNING_RATE, LENGTH, batches, cotangent

Step = Callable[[torch.Tensor], None]

TORCH = {
    "torch SGD": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    "torch Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=LEARNING_RATE),
    "torch SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=LEARNING_RATE),
}
# The optimizer, the pooling, and the ids in a bag. Unpooled, as the rows of a sequence are read, and as bags of one id,
# for which it has another program.
FBGEMM = {
    "FBGEMM row-wise Adagrad": (EmbOptimType.EXACT_ROWWISE_ADAGRAD, PoolingMode.NONE, 1),
    "FBGEMM SGD": (EmbOptimType.EXACT_SGD, PoolingMode.NONE, 1),
    "FBGEMM row-wise Adagrad, bags of one": (EmbOptimType.EXACT_ROWWISE_ADAGRAD, PoolingMode.SUM, 1),
    "FBGEMM SGD, bags of one": (EmbOptimType.EXACT_SGD, PoolingMode.SUM, 1),
    "FBGEMM row-wise Adagrad, bags": (EmbOptimType.EXACT_ROWWISE_ADAGRAD, PoolingMode.SUM, LENGTH),
}


def torch_step(name: str, rows: int) -> Step:
    """A step of an embedding with sparse gradients."""
    embedding = torch.nn.Embedding(rows, DIM, sparse=True)
    optimizer, gradient = TORCH[name](list(embedding.parameters())), torch.from_numpy(cotangent())

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        embedding(ids).backward(gradient)
        optimizer.step()

    return step


def torch_lookup(rows: int) -> Step:
    """A lookup without a gradient."""
    weight = torch.randn(rows, DIM)
    return lambda ids: torch.nn.functional.embedding(ids, weight)


def torch_bag(rows: int) -> Step:
    """Sums of bags without a gradient."""
    weight = torch.randn(rows, DIM)
    return lambda ids: torch.nn.functional.embedding_bag(ids.view(BAGS, LENGTH), weight, mode="sum")


def fbgemm_step(name: str, rows: int) -> Step:
    """A step of a table whose optimizer is part of its backward pass."""
    optimizer, pooling, length = FBGEMM[name]
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=optimizer,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
        pooling_mode=pooling,
        bounds_check_mode=BoundsCheckMode.FATAL,
    )
    offsets = torch.arange(0, IDS + 1, length)
    gradient = torch.from_numpy(cotangent(IDS // length))
    return lambda ids: tables(ids, offsets).backward(gradient)


def main() -> None:
    """Answer one line of JSON for each on standard input: build a step, or run it once."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    answers = sys.stdout
    sys.stdout = sys.stderr
    others = {"torch lookup": torch_lookup, "torch EmbeddingBag": torch_bag}
    step: Step | None = None
    all_ids: list[torch.Tensor] = []
    turn = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "build":
            step = None
            gc.collect()
            name, rows = request["name"], request["rows"]
            all_ids = [torch.from_numpy(ids).long() for ids in batches(rows)]
            if name in others:
                step = others[name](rows)
            else:
                step = (torch_step if name in TORCH else fbgemm_step)(name, rows)
            answer = {"threads": torch.get_num_threads()}
        else:
            assert step is not None
            ids, turn = all_ids[turn % len(all_ids)], turn + 1
            start = time.perf_counter()
            step(ids)
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
