import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors
from damage import damages, seeds, told
from real import MINILM
from safetensors.numpy import save_file

from embax import Vectors, files
from embax.files import UnnamedRowsWarning
from embax.files._formats.safetensors.tensor import FORMAT
from embax.files._io.contents import Options
from embax.files._io.open import opened

TABLE = np.arange(15, dtype=np.float32).reshape(5, 3)
TOKENS = ["[PAD]", "[UNK]", "king", "##ly", "größe"]
MODEL = MINILM / "model" / "model.safetensors"
NAME = "embeddings.word_embeddings.weight"


def read(path, **options):
    with opened(path, 100.0) as source:
        return FORMAT.read(source, Options(**options))


def saved(folder, tensors=None, **beside):
    save_file({"token_embed": TABLE} if tensors is None else tensors, folder / "model.safetensors")
    for name, content in beside.items():
        name = name.replace("__", ".")
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(content, encoding="utf-8")
    return str(folder / "model.safetensors")


def tokenizer(vocabulary, kind="BPE", added=(), **model):
    return {"model": {"type": kind, "vocab": vocabulary, **model}, "added_tokens": list(added)}


IDS = {token: row for row, token in enumerate(TOKENS)}
LISTINGS = [
    {"tokenizer__json": tokenizer(IDS)},
    {"tokenizer__json": tokenizer(dict(reversed(IDS.items())), "WordPiece")},
    {"tokenizer__json": tokenizer([[token, -1.5] for token in TOKENS], "Unigram")},
    {"tokenizer__json": tokenizer(dict(list(IDS.items())[:4]), added=[{"id": 4, "content": "größe", "special": True}])},
    {"vocab__txt": "\n".join(TOKENS)},
    {"vocab__txt": "".join(token + "\r\n" for token in TOKENS)},
    {"vocab__json": IDS},
    {"vocab__json": TOKENS},
    {"tokenizer__json": tokenizer(IDS), "vocab__txt": "others", "vocab__json": ["others"]},
    {"vocab__txt": "\n".join(TOKENS), "vocab__json": ["others"]},
]


@pytest.mark.parametrize("name", ["", ":token_embed"])
@pytest.mark.parametrize("beside", LISTINGS)
def test_read_takes_the_vocabulary_of_the_tokenizer_beside(tmp_path, beside, name):
    path = saved(tmp_path, **beside) + name
    with opened(path, 100.0) as source:
        assert FORMAT.recognises(source)
    found = read(path)
    assert found.vocabulary.tokens() == TOKENS
    assert found.weight.tobytes() == TABLE.tobytes()
    assert isinstance(found.weight.base, np.memmap)


def test_read_of_a_transformers_table():
    found = read(f"{MODEL}:{NAME}")
    with safetensors.safe_open(MODEL, framework="numpy") as file:
        np.testing.assert_array_equal(found.weight, file.get_tensor(NAME))
    assert found.vocabulary.tokens() == (MODEL.parent / "vocab.txt").read_text("utf-8").split("\n")[:30522]
    tokens = {"padding": "[PAD]", "unknown": "[UNK]", "classification": "[CLS]", "separator": "[SEP]", "mask": "[MASK]"}
    assert found.vocabulary.special == {role: found.vocabulary.ids(token) for role, token in tokens.items()}
    assert isinstance(found.weight.base, np.memmap)


def test_vectors_of_a_transformers_table():
    row = (MODEL.parent / "vocab.txt").read_text("utf-8").split("\n").index("king")
    with safetensors.safe_open(MODEL, framework="numpy") as file:
        expected = file.get_tensor(NAME)[row]
    for path in (f"{MODEL}:{NAME}", str(MODEL)):  # there is but one that fits the vocabulary
        np.testing.assert_array_equal(Vectors.load(path)["king"], expected)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_read_of_each_kind_of_float(tmp_path, kind):
    path = saved(tmp_path, {"x": np.zeros(3), "token_embed": TABLE.astype(kind)}, vocab__txt="\n".join(TOKENS))
    assert read(path).weight.dtype == kind
    for options in ({}, {"mmap": False}, {"dtype": np.dtype(np.float32)}, {"limit": 2}):
        rows = options.get("limit", 5)
        found = read(path, **options)
        np.testing.assert_array_equal(found.weight.astype(np.float32), TABLE[:rows])
        assert found.vocabulary.tokens() == TOKENS[:rows]


def test_read_of_a_vocabulary_in_another_encoding(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "vocab.txt").write_bytes("\n".join(TOKENS).encode("latin-1"))
    assert read(path, encoding="latin-1").vocabulary.tokens() == TOKENS
    with pytest.warns(files.UndecodedTokensWarning, match=r"vocab.txt: 1 of 5 tokens are not UTF-8"):
        assert read(path).vocabulary.tokens()[:3] == ["[PAD]", "[UNK]", "king"]
    with pytest.raises(files.FormatError, match=r"vocab.txt: token \d is not UTF-8: .* Pass its encoding"):
        read(path, errors="strict")
    with pytest.raises(files.FormatError, match="'nonsense' is no encoding"):
        read(path, encoding="nonsense")


def test_read_leaves_rows_without_a_token_out(tmp_path):
    path = saved(tmp_path, vocab__txt="a\nb\nc\n") + ":token_embed"
    with pytest.warns(UnnamedRowsWarning, match="2 of 5 rows are left out"):
        found = read(path)
    np.testing.assert_array_equal(found.weight, TABLE[:3])
    assert isinstance(found.weight.base, np.memmap)


@pytest.mark.parametrize("mmap", [None, False])
def test_read_of_ids_with_holes(tmp_path, mmap):
    beside = {"tokenizer__json": tokenizer({"d": 3, "b": 1}), "special_tokens_map__json": {"eos_token": "d"}}
    path = saved(tmp_path, **beside) + ":token_embed"
    with pytest.warns(UnnamedRowsWarning, match="3 of 5 rows"):
        found = read(path, mmap=mmap)
    assert found.vocabulary.tokens() == ["b", "d"]
    assert found.vocabulary.special == {"end": 1}
    np.testing.assert_array_equal(found.weight, TABLE[[1, 3]])
    with pytest.warns(UnnamedRowsWarning):
        assert read(path, limit=1).vocabulary.tokens() == ["b"]


@pytest.mark.parametrize(
    ("beside", "special"),
    [
        ({"tokenizer__json": tokenizer(IDS, unk_token="[UNK]")}, {"unknown": 1}),
        ({"tokenizer__json": tokenizer([[token, 0] for token in TOKENS], unk_id=1)}, {"unknown": 1}),
        ({"tokenizer__json": tokenizer(IDS) | {"padding": {"pad_token": "[PAD]"}}}, {"padding": 0}),
        ({"tokenizer__json": tokenizer(IDS) | {"padding": None}, "tokenizer_config__json": {"bos_token": None}}, {}),
        ({"vocab__json": IDS, "special_tokens_map__json": {"unk_token": {"content": "[UNK]"}}}, {"unknown": 1}),
        ({"vocab__json": IDS, "tokenizer_config__json": {"mask_token": "king", "bos_token": "?"}}, {"mask": 2}),
    ],
)
def test_read_of_special_tokens(tmp_path, beside, special):
    assert read(saved(tmp_path, **beside)).vocabulary.special == special


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", r"2 of its tensors .*'embed' \(5, 3\), 'a' \(5, 3\), 'b' \(2, 3\)\."),
        (":c", r":c: there is no such tensor. It has 'embed' \(5, 3\)"),
        (":ids", r":ids: is I32 \(5, 3\), which is no table of F16"),
        (":flat", r":flat: is F32 \(5,\), which is no table"),
        (":b", "has 2 rows, fewer than the 5 that"),
    ],
)
def test_read_error_lists_the_tensors_if_none_fits(tmp_path, name, match):
    tensors = {
        "a": TABLE,
        "embed": TABLE,
        "b": TABLE[:2].copy(),
        "ids": TABLE.astype(np.int32),
        "flat": TABLE[:, 0].copy(),
    }
    path = saved(tmp_path, tensors, vocab__txt="\n".join(TOKENS))
    with pytest.raises(files.FormatError, match=match):
        read(path + name)


def test_read_lists_few_tensors(tmp_path):
    path = saved(tmp_path, {f"t{number}": TABLE for number in range(13)}, vocab__txt="a")
    with pytest.raises(files.FormatError, match="and 3 more"):
        read(path)
    with pytest.raises(files.FormatError, match="no table of floats"):
        read(saved(tmp_path, {"x": np.zeros(3)}))


@pytest.mark.parametrize(
    ("beside", "match"),
    [
        ({}, "has no vocabulary beside it. Put tokenizer.json or vocab.txt or vocab.json into its folder"),
        ({"vocab__json": "{"}, "vocab.json: is no JSON"),
        ({"vocab__json": "[" * 10**5}, "vocab.json: is no JSON"),
        ({"vocab__json": "3"}, "holds neither a list of tokens"),
        ({"vocab__json": ["a", 3]}, "token 1 must be a string, got 3"),
        ({"vocab__json": ["a", "\ud800"]}, "token 1 is not valid Unicode"),
        ({"vocab__json": {"a": "0"}}, "must give tokens row numbers, got 'a' and '0'"),
        ({"vocab__json": {"a": True}}, "must give tokens row numbers"),
        ({"vocab__json": {"a": -1}}, "must give tokens row numbers"),
        ({"vocab__json": {"a": 1 << 62}}, "must give tokens row numbers"),
        ({"vocab__json": {"a": 1 << 61}}, "fewer than the 2,305,843,009,213,693,953 that"),
        ({"vocab__json": {"a": 0, "b": 0}}, "gives row 0 to two tokens, 'a' and 'b'"),
        ({"tokenizer__json": {"model": {}}}, "is no tokenizer"),
        ({"tokenizer__json": tokenizer(["a", "b"])}, "is no tokenizer"),
        ({"tokenizer__json": tokenizer([["a", 0]], unk_id=7)}, "is no tokenizer"),
        ({"tokenizer__json": tokenizer(IDS, added=[{"id": 5}])}, "is no tokenizer"),
        ({"tokenizer__json": tokenizer(IDS) | {"added_tokens": 3}}, "is no tokenizer"),
        ({"vocab__txt": "a", "special_tokens_map__json": "[]"}, "special_tokens_map.json: must hold a JSON object"),
        ({"vocab__txt": "a", "tokenizer_config__json": "nonsense"}, "tokenizer_config.json: is no JSON"),
    ],
)
def test_read_refuses_malformed_vocabularies(tmp_path, beside, match):
    with pytest.raises(files.FormatError, match=match):
        read(saved(tmp_path, **beside) + ":token_embed")


def test_write_is_not_offered(tmp_path):
    with pytest.raises(ValueError, match='"tensor", which is only read'):
        FORMAT.write(tmp_path / "v", None)


@seeds
@pytest.mark.parametrize("beside", LISTINGS[:8])
@pytest.mark.filterwarnings(
    "ignore::embax.files.UnnamedRowsWarning",
    "ignore::embax.files.DuplicateTokensWarning",
    "ignore::embax.files.UndecodedTokensWarning",
)
def test_read_of_any_damage_gives_rows_or_a_format_error(tmp_path, beside, seed):
    path = saved(tmp_path, **beside)
    for which in ("model.safetensors", next(iter(beside)).replace("__", ".")):
        whole = (tmp_path / which).read_bytes()
        for case, (name, data) in enumerate(damages(whole, 14, seed + LISTINGS.index(beside))):
            (tmp_path / which).write_bytes(data)
            with told(f"{which}, {name}"):
                try:
                    found = read(path + ["", ":token_embed"][case % 2], mmap=[None, False][case // 2 % 2])
                except files.FormatError as error:
                    assert str(tmp_path) in str(error)  # noqa: PT017
                else:
                    assert len(found.vocabulary) == len(found.weight)
        (tmp_path / which).write_bytes(whole)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    assert read(saved(tmp_path, vocab__txt="\n".join(TOKENS))).vocabulary.tokens() == TOKENS
