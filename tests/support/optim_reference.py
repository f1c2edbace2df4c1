"""Lazy optimizers in float64 NumPy: a loop over the distinct rows that were read, formula by formula. No JAX."""

import numpy as np


class Lazy:
    """A table whose rows are updated one by one, when they are read.

    A rule is called as `rule(gradient, row, memory, step)`, with the summed gradient of a row, the row, a dict that
    belongs to the row, and the number of steps before this one; it returns what to add to the row.
    """

    def __init__(self, weight, rule, padding_idx=None, max_norm=None):
        self.weight = np.array(weight, np.float64)
        self.rule, self.padding_idx, self.max_norm = rule, padding_idx, max_norm
        self.memories = [{} for _ in self.weight]
        self.steps = 0

    def step(self, ids, values):
        """Sum the values by row and update the rows that occur; return their numbers."""
        rows = sorted(set(np.asarray(ids).tolist()) - {self.padding_idx, len(self.weight)})
        values = np.asarray(values, np.float64)
        gradients = {row: sum(values[i] for i in range(len(ids)) if ids[i] == row) for row in rows}
        if self.max_norm is not None:
            norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
            gradients = {row: gradient * min(1, self.max_norm / norm) for row, gradient in gradients.items()}
        for row in rows:
            self.weight[row] += self.rule(gradients[row], self.weight[row], self.memories[row], self.steps)
        self.steps += 1
        return rows


def rate(learning_rate, step):
    """The learning rate of a step, be it a number or a schedule."""
    return float(learning_rate(step)) if callable(learning_rate) else learning_rate


def remember(memory, name, value, decay, new, start=0.0):
    """Update a running mean or sum of a row: `decay * old + new * value`."""
    memory[name] = decay * memory.get(name, start) + new * value
    return memory[name]


def sgd(learning_rate, momentum=0.0, nesterov=False):
    def rule(gradient, row, memory, step):
        trace = remember(memory, "trace", gradient, momentum, 1)
        return -rate(learning_rate, step) * (gradient + momentum * trace if nesterov else trace)

    return rule


def adagrad(learning_rate, start=0.1, eps=1e-7):
    def rule(gradient, row, memory, step):
        total = remember(memory, "sum", gradient**2, 1, 1, start)
        return -rate(learning_rate, step) * gradient / np.sqrt(total + eps)

    return rule


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, limit=np.inf):
    def rule(gradient, row, memory, step):
        gradient = np.clip(gradient, -limit, limit)
        first = remember(memory, "mean", gradient, b1, 1 - b1) / (1 - b1 ** (step + 1))
        second = remember(memory, "mean_square", gradient**2, b2, 1 - b2) / (1 - b2 ** (step + 1))
        return -rate(learning_rate, step) * (first / (np.sqrt(second) + eps) + weight_decay * row)

    return rule


def rmsprop(learning_rate, decay=0.9, eps=1e-8):
    def rule(gradient, row, memory, step):
        return (
            -rate(learning_rate, step)
            * gradient
            / np.sqrt(remember(memory, "mean_square", gradient**2, decay, 1 - decay) + eps)
        )

    return rule


def lion(learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3):
    def rule(gradient, row, memory, step):
        direction = np.sign(b1 * memory.get("mean", 0) + (1 - b1) * gradient)
        remember(memory, "mean", gradient, b2, 1 - b2)
        return -rate(learning_rate, step) * (direction + weight_decay * row)

    return rule


def rowwise_adagrad(learning_rate, start=0.0, eps=1e-8):
    def rule(gradient, row, memory, step):
        total = remember(memory, "sum", (gradient**2).mean(), 1, 1, start)
        return -rate(learning_rate, step) * gradient / (np.sqrt(total) + eps)

    return rule


def rowwise_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    def rule(gradient, row, memory, step):
        first = remember(memory, "mean", gradient, b1, 1 - b1) / (1 - b1 ** (step + 1))
        second = remember(memory, "mean_square", (gradient**2).mean(), b2, 1 - b2) / (1 - b2 ** (step + 1))
        return -rate(learning_rate, step) * first / (np.sqrt(second) + eps)

    return rule
