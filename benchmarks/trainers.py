"""Trains word vectors once, in a process of its own, and prints what that took as JSON. Started by train.py."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Trained = tuple[list[str], Any, Any]  # tokens, their vectors and the vectors that they are multiplied with
Train = Callable[[argparse.Namespace], Trained]


def kilobytes() -> int:
    """The most memory that this process has held."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])


def gensim(model: str, by_file: bool = False) -> Train:
    """Use gensim with two workers, by sentences or, which needs less memory, by a file."""
    import gensim.models
    from gensim.models.word2vec import LineSentence

    def train(options: argparse.Namespace) -> Trained:
        source = {"corpus_file": options.text} if by_file else {"sentences": LineSentence(options.text)}
        made = gensim.models.FastText if model == "subwords" else gensim.models.Word2Vec
        learned = made(
            **source,
            vector_size=100,
            window=5,
            negative=5,
            min_count=5,
            sample=options.sample,
            epochs=options.epochs,
            seed=options.seed,
            sg=int(model != "cbow"),
            workers=2,
        )
        tokens = learned.wv.index_to_key
        return tokens, learned.wv, learned.syn1neg

    return train


def ours(model: str, engine: str, threads: int = 1) -> Train:
    """embax; the output vectors, which it does not return, are taken from the loop of training."""
    import jax  # noqa: F401

    import embax.train
    from embax.train import _word2vec

    loop, found = _word2vec.train, {}

    def keeping(*args: Any) -> Any:
        found["outputs"] = loop(*args)
        return found["outputs"]

    _word2vec.train = keeping

    def sequences(path: str) -> Iterator[list[str]]:
        with open(path, encoding="utf-8") as lines:
            yield from map(str.split, lines)

    def train(options: argparse.Namespace) -> Trained:
        more = {"subwords": True} if model == "subwords" else {}
        learn = embax.train.cbow if model == "cbow" else embax.train.skipgram
        vectors = learn(
            sequences(options.text),
            sample=options.sample,
            epochs=options.epochs,
            seed=options.seed,
            engine=engine,
            threads=threads,
            **more,
        )
        return vectors.tokens(), vectors, found["outputs"][1]

    return train


# Each way: how to get its function, which imports what it needs.
WAYS: dict[str, Callable[[], Train]] = {
    "native": lambda: ours("skipgram", "native"),
    "native, 2 threads": lambda: ours("skipgram", "native", 2),
    "XLA": lambda: ours("skipgram", "xla"),
    "gensim": lambda: gensim("skipgram"),
    "gensim, by file": lambda: gensim("skipgram", by_file=True),
    "native CBOW": lambda: ours("cbow", "native"),
    "XLA CBOW": lambda: ours("cbow", "xla"),
    "gensim CBOW": lambda: gensim("cbow"),
    "gensim CBOW, by file": lambda: gensim("cbow", by_file=True),
    "native sub-words": lambda: ours("subwords", "native"),
    "XLA sub-words": lambda: ours("subwords", "xla"),
    "gensim FastText": lambda: gensim("subwords"),
    "gensim FastText, by file": lambda: gensim("subwords", by_file=True),
}


def main() -> None:
    """Train once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("text", help="Lines of words with spaces between them.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--sample", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, help="A folder for the vectors.")
    parser.add_argument("--ask", type=Path, help="A file of words, whose vectors are written, too; JSON.")
    options = parser.parse_args()
    train = WAYS[options.way]()
    before, start = kilobytes(), time.perf_counter()
    tokens, vectors, outputs = train(options)
    seconds, peak = time.perf_counter() - start, kilobytes() - before
    used = resource.getrusage(resource.RUSAGE_SELF)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        inputs = vectors.vectors if hasattr(vectors, "vectors") else np.asarray(vectors.weight)
        asked = json.loads(options.ask.read_text()) if options.ask else []
        rows = np.asarray([vectors[word] for word in asked], np.float32) if asked else np.zeros((0, 1), np.float32)
        np.savez(options.output / "vectors.npz", inputs=inputs, outputs=np.asarray(outputs), asked=rows)
        (options.output / "tokens.json").write_text(json.dumps(list(tokens)))
    json.dump({"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "bytes": peak * 1024}, sys.stdout)


if __name__ == "__main__":
    main()
