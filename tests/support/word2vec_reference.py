"""Steps of word2vec over segments, pair by pair, in float64."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class _Moves:
    """Sums of moves and curvatures by row."""

    def __init__(self, weight):
        self.sums, self.curvature = np.zeros_like(weight), np.zeros(len(weight))

    def rates(self, rate):
        with np.errstate(divide="ignore"):
            return np.minimum(rate, 1 / self.curvature)


def reference_steps(plan, rows, outputs, tokens, drawn, rates, pieces=None):
    """Run some steps; `pieces` are the rows of each word, by default one.

    Returns the tables, the loss with the number of pairs, and how many rows were held back by their limit.
    """
    rows, outputs = rows.astype(np.float64), outputs.astype(np.float64)
    pieces = pieces or [[row] for row in range(len(outputs))]
    loss, limited = np.zeros(2), 0
    for step, rate in enumerate(rates):
        inputs = np.asarray([rows[of].mean(axis=0) for of in pieces])
        moves = _Moves(inputs), _Moves(outputs)
        for segment in range(tokens.shape[1]):
            noise = drawn.noise[step, segment]
            found = list(_sequences(tokens[step, segment], len(inputs)))
            if plan.model == "skipgram":
                loss += _skipgram(plan, inputs, outputs, found, noise, moves)
            else:
                loss += _cbow(plan, inputs, outputs, found, noise, drawn.widths[step, segment], moves)
        of_rows = _Moves(rows)
        for word, of in enumerate(pieces):
            np.add.at(of_rows.sums, of, moves[0].sums[word])
            np.add.at(of_rows.curvature, of, moves[0].curvature[word])
        moves = of_rows, moves[1]
        of_rows = [move.rates(rate) for move in moves]
        limited += sum(int((rates < rate).sum()) for rates in of_rows)
        rows = rows + of_rows[0][:, None] * moves[0].sums
        outputs = outputs + of_rows[1][:, None] * moves[1].sums
    return rows, outputs, loss, limited


def _sequences(segment, rows):
    """The sequences of a segment: lists of (place, row)."""
    sequence = []
    for place, token in enumerate(segment):
        if token == rows:
            continue
        if token < 0:
            yield sequence
            sequence = []
        sequence.append((place, int(~token if token < 0 else token)))
    yield sequence


def _skipgram(plan, inputs, outputs, sequences, noise, moves):
    loss = pairs = 0.0
    for sequence in sequences:
        for place, context in sequence:
            total = 0.0
            for other, centre in sequence:
                distance = abs(place - other)
                if 0 < distance <= plan.window:
                    weight = (plan.window + 1 - distance) / plan.window * plan.length / (plan.length - distance)
                    total += weight
                    loss += _pair(inputs, outputs, context, centre, 1, weight, moves)
            for word in noise:
                weight = total * plan.negative / plan.noise
                loss += _pair(inputs, outputs, context, int(word), 0, weight, moves)
            pairs += total
    return np.asarray([loss, pairs])


def _pair(inputs, outputs, context, target, label, weight, moves):
    x, t = inputs[context], outputs[target]
    probability = sigmoid(x @ t)
    moves[0].sums[context] += weight * (label - probability) * t
    moves[1].sums[target] += weight * (label - probability) * x
    moves[0].curvature[context] += weight * _curvature(label, probability) * (t @ t)
    moves[1].curvature[target] += weight * _curvature(label, probability) * (x @ x)
    return -weight * np.log(probability if label else 1 - probability)


def _curvature(label, probability):
    wrong = abs(label - probability)
    return wrong * max(1 - wrong, 0.25)


def _cbow(plan, inputs, outputs, sequences, noise, widths, moves):
    loss = centres = 0.0
    for sequence in sequences:
        for place, centre in sequence:
            contexts = [row for other, row in sequence if 0 < abs(place - other) <= widths[place]]
            if not contexts:
                continue
            centres += 1
            mean, error, curvature = np.mean([inputs[row] for row in contexts], axis=0), 0.0, 0.0
            for target, label, weight in [(centre, 1, 1.0), *((row, 0, plan.negative / plan.noise) for row in noise)]:
                t = outputs[target]
                probability = sigmoid(mean @ t)
                error = error + weight * (label - probability) * t
                curvature += weight * _curvature(label, probability) * (t @ t)
                moves[1].sums[target] += weight * (label - probability) * mean
                moves[1].curvature[target] += weight * _curvature(label, probability) * (mean @ mean)
                loss -= weight * np.log(probability if label else 1 - probability)
            for row in contexts:
                moves[0].sums[row] += error
                moves[0].curvature[row] += curvature
    return np.asarray([loss, centres])
