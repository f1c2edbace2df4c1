"""The training of word vectors in plain Python and float64, with the random numbers of the native kernel."""

from typing import NamedTuple

import numpy as np

ALL_64 = (1 << 64) - 1
# As in the kernel: pairs that move together, and how often the loss is taken.
CONTEXTS, PAIRED, SLOTS, POOLED, SAMPLED = 16, 6, 8, 8, 64
PAIRS_TIMES_RATE, POOLED_TIMES_RATE = np.float32(0.4), np.float32(1.2)


class Vocabulary(NamedTuple):
    keep: np.ndarray
    cut: np.ndarray
    alias: np.ndarray
    starts: np.ndarray
    pieces: np.ndarray


class Random:
    def __init__(self, seed):
        self.state = mixed(seed & ALL_64)

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & ALL_64
        return mixed(self.state)


def mixed(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL_64
    return z ^ (z >> 31)


def below(number, drawn):
    return (drawn >> 32) * number >> 32


def alias_tables(weights):
    """Walker's tables of a distribution."""
    scaled = np.asarray(weights, np.float64) / np.sum(weights) * len(weights)
    cut, alias = np.ones(len(weights)), np.arange(len(weights), dtype=np.int32)
    small, large = list(np.flatnonzero(scaled < 1)), list(np.flatnonzero(scaled >= 1))
    while small and large:
        low, high = small.pop(), large[-1]
        cut[low], alias[low] = scaled[low], high
        scaled[high] -= 1 - scaled[low]
        if scaled[high] < 1:
            small.append(large.pop())
    return np.floor(np.clip(cut, 0, 1) * 0xFFFFFFFF).astype(np.uint32), alias


def train(inputs, outputs, vocabulary, ids, rates, seed, window, negative, cbow, parts=1):
    """Return both tables and the loss after all windows, one after the other."""
    run = _Run(np.array(inputs, np.float64), np.array(outputs, np.float64), vocabulary, window, negative, cbow)
    ids = [int(i) for i in ids]
    while ids and ids[-1] < 0:
        ids.pop()
    ends = [0, *(part_end(ids, parts, k) for k in range(parts))]
    for k in range(parts):
        run.part(ids, ends[k], ends[k + 1], rates, Random((int(seed[0]) << 32 | int(seed[1])) + k))
    return run.inputs, run.outputs, np.array([run.loss, run.pairs])


def part_end(ids, parts, k):
    end = len(ids) * (k + 1) // parts
    latest = len(ids) * (k + 2) // parts if k + 1 < parts else end
    return next((i for i in range(end, latest) if i > 0 and ids[i - 1] < 0), end)


def pieces_of(things, most):
    """Cut a list into as few pieces as there must be, of nearly one size."""
    number = -(-len(things) // most)
    return [things[len(things) * k // number : len(things) * (k + 1) // number] for k in range(number)]


def most_at_once(limit, rate, most):
    """How many pairs move together, in float32 as in the kernel."""
    return most if not rate * np.float32(most) > limit else max(1, int(limit / rate))


def logistic(x):
    return 1 / (1 + np.exp(-x))


class _Run:
    def __init__(self, inputs, outputs, vocabulary, window, negative, cbow):
        self.inputs, self.outputs, self.vocabulary = inputs, outputs, vocabulary
        self.window, self.negative, self.cbow = window, negative, cbow
        self.subwords = len(vocabulary.starts) > 0
        self.loss, self.pairs = 0.0, 0

    def part(self, ids, begin, end, rates, random):
        self.random, self.windows = random, 0
        at = begin
        while at < end:
            first = at
            while at < end and ids[at] >= 0:
                at += 1
            kept = [i for i in ids[first:at] if (random.next() & 0xFFFFFFFF) <= self.vocabulary.keep[i]]
            if len(kept) > 1:
                for c in range(len(kept)):
                    done = (first + (at - first) * c / len(kept)) / len(ids)
                    self.rate = rates[0] + (rates[1] - rates[0]) * np.float32(done)
                    self.centre(kept, c)
            at += 1

    def centre(self, kept, c):
        width = 1 + below(self.window, self.random.next())
        contexts = [kept[j] for j in range(max(0, c - width), min(len(kept), c + width + 1)) if j != c]
        by_centre, per_context = self.subwords and not self.cbow, self.rate * np.float32(1 + self.negative)
        pooled = most_at_once(POOLED_TIMES_RATE, per_context, POOLED)
        shared = pieces_of(contexts, pooled) if by_centre else [contexts]
        noise = [[self.noise() for _ in range(self.negative)] for _ in shared]
        self.sampled = self.windows % SAMPLED == 0
        self.windows += 1
        self.pairs += self.sampled * (1 if self.cbow else len(contexts))
        if self.cbow:
            rows = [row for word in contexts for row in self.rows_of(word)]
            self.move_mean(rows, [(kept[c], noise[0], [kept[c]], 1.0)])
        elif self.subwords:
            groups = [(None, words, block, float(len(block))) for words, block in zip(noise, shared, strict=True)]
            self.move_mean(self.rows_of(kept[c]), groups)
        else:
            targets = [(kept[c], 1, 1.0)] + [(word, 0, float(word != kept[c])) for word in noise[0]]
            for block in pieces_of(contexts, most_at_once(PAIRS_TIMES_RATE, self.rate, CONTEXTS)):
                for group in pieces_of(targets, PAIRED):
                    self.move_pairs(block, group)

    def noise(self):
        drawn = self.random.next()
        row = below(len(self.vocabulary.cut), drawn)
        return row if (drawn & 0xFFFFFFFF) <= self.vocabulary.cut[row] else int(self.vocabulary.alias[row])

    def rows_of(self, word):
        if not self.subwords:
            return [word]
        return [
            int(row) for row in self.vocabulary.pieces[self.vocabulary.starts[word] : self.vocabulary.starts[word + 1]]
        ]

    def errors(self, logits, labels, weights):
        if self.sampled:
            self.loss += np.sum(weights * np.logaddexp(0, np.where(labels > 0, -logits, logits)))
        return (labels - logistic(logits)) * weights * self.rate

    def move_pairs(self, contexts, targets):
        words, labels, weights = (np.array(column) for column in zip(*targets, strict=True))
        old = self.outputs[words]
        errors = self.errors(self.inputs[contexts] @ old.T, labels, weights)
        moves = np.zeros_like(old)
        for context, error in zip(contexts, errors, strict=True):
            row = self.inputs[context].copy()  # a second time, it has moved already
            moves += error[:, None] * row
            self.inputs[context] = row + error @ old
        np.add.at(self.outputs, words, moves)

    def move_mean(self, rows, groups):
        start = np.mean(self.inputs[rows], axis=0)
        total = np.zeros_like(start)
        for centre, noise, positives, weight in groups:
            mean = start + total
            ones = [positives[0]] if centre is not None else positives
            targets = [(word, 1, 1.0) for word in ones]
            targets += [(word, 0, weight * np.mean([word != one for one in positives])) for word in noise]
            for group in pieces_of(targets, SLOTS):
                words, labels, weights = (np.array(column) for column in zip(*group, strict=True))
                errors = self.errors(self.outputs[words] @ mean, labels, weights)
                for word, error in zip(words, errors, strict=True):
                    row = self.outputs[word].copy()
                    total += error * row
                    self.outputs[word] = row + error * mean
        np.add.at(self.inputs, rows, np.broadcast_to(total, (len(rows), len(total))))
