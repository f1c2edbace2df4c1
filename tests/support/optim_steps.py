"""Steps of optimizers: of one transformation, and of many in one compiled program."""

import jax
import numpy as np

import embax


def take_step(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return embax.apply_updates(params, updates), state


class Together:
    """Transformations by their names, all of them in one program for the start and one for a step.

    To compile a program is most of what a test costs, and one of many transformations costs little more than one of a
    single one. Everything is a dict by the names; a step donates the parameters and the state.
    """

    def __init__(self, txs):
        self.txs = txs
        self.start = jax.jit(lambda params: {name: tx.init(params[name]) for name, tx in txs.items()})
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params, states, gradients):
        both = {name: take_step(tx, params[name], states[name], gradients[name]) for name, tx in self.txs.items()}
        return {name: x for name, (x, _) in both.items()}, {name: x for name, (_, x) in both.items()}

    def run(self, params, gradients):
        """Return the parameters and states after a step for each of the gradients."""
        states = self.start(params)
        for each in gradients:
            params, states = self.step(params, states, each)
        return params, states

    def of_all(self, make):
        """Return what `make()` gives for each name, an object of its own."""
        return {name: make() for name in self.txs}


def host(tree):
    """Copies of the arrays of a tree, which stay when the tree is donated."""
    return jax.tree.map(np.array, tree)
