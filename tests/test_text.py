"""Tokenizers: texts come back, CLIP's tokens are transformers', and mistakes are told."""

import json
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.clip_text import CLIPTextModel
from jaxdiff.text import ByteTokenizer, ClipTokenizer, Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = FIXTURES / "clip_tokenizer"
REFERENCE = json.loads((FIXTURES / "clip_tokens.json").read_text())
TEXTS = [entry["text"] for entry in REFERENCE]


@pytest.fixture(params=["tokenizer.json", "its folder", "vocab.json and merges.txt"])
def clip(request, tmp_path) -> ClipTokenizer:
    """The tiny vocabulary, from each form that it may lie on disk in."""
    if request.param == "tokenizer.json":
        return ClipTokenizer(VOCABULARY / "tokenizer.json")
    if request.param == "its folder":
        shutil.copy(VOCABULARY / "tokenizer.json", tmp_path)
    else:
        copy_two_files(tmp_path)
    return ClipTokenizer(str(tmp_path))


def copy_two_files(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(VOCABULARY / name, folder)


def check_layout(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> None:
    """Begin, what is not begin, end, padding; the mask marks all but the last."""
    assert tokens.dtype == np.int32
    assert mask.dtype == np.bool_
    assert tokens.shape == mask.shape == (len(tokens), tokenizer.max_length)
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.vocab_size
    for row, real in zip(tokens, mask, strict=True):
        count = real.sum()
        assert real[:count].all()
        assert row[0] == tokenizer.begin_id
        assert row[count - 1] == tokenizer.end_id
        assert (row[count:] == tokenizer.pad_id).all()


def test_bytes_come_back():
    tokenizer = ByteTokenizer(120)
    tokens, mask = tokenizer.encode(TEXTS)
    check_layout(tokenizer, tokens, mask)
    assert tokenizer.decode(tokens) == TEXTS
    assert mask.sum(1).tolist() == [len(text.encode()) + 2 for text in TEXTS]
    assert ByteTokenizer(6).encode(["hé"]).tokens.tolist() == [[256, 104, 195, 169, 257, 258]]
    assert ByteTokenizer(2).encode([""]).tokens.tolist() == [[256, 257]]
    assert ByteTokenizer(5).encode([]).tokens.shape == (0, 5)


def test_too_long_a_text_is_refused_or_cut():
    tokenizer = ByteTokenizer(7)
    assert tokenizer.decode(tokenizer.encode(["abcde"]).tokens) == ["abcde"]
    with pytest.raises(JaxdiffError, match=r'text 1 \("abcdef"\) is 8 tokens long with begin and end, and 7 are'):
        tokenizer.encode(["", "abcdef"])
    cut = tokenizer.encode(["abcdef", "ab", "abcdé"], truncate=True)
    check_layout(tokenizer, *cut)
    assert tokenizer.decode(cut.tokens) == ["abcde", "ab", "abcd\ufffd"]


def test_clip_s_tokens_are_transformers(clip):
    tokens, mask = clip.encode(TEXTS)
    check_layout(clip, tokens, mask)
    for text, row, real, entry in zip(TEXTS, tokens, mask, REFERENCE, strict=True):
        assert row[real].tolist() == entry["ids"], text
    assert clip.vocab_size == 664
    assert (clip.begin_id, clip.end_id, clip.pad_id) == (662, 663, 663)


def test_clip_s_tokens_come_back_as_words(clip):
    whole = [entry for entry in REFERENCE if "<|endoftext|>" not in entry["text"]]  # where a text ends
    tokens = clip.encode([entry["text"] for entry in whole]).tokens
    assert clip.decode(tokens) == [entry["decoded"] for entry in whole]
    assert clip.decode(clip.encode(["A  cat, SITTING."]).tokens) == ["a cat , sitting ."]
    assert clip.decode(clip.encode(clip.decode(tokens)).tokens) == clip.decode(tokens)


def test_every_symbol_has_tokens(clip):
    symbols = [chr(i) for i in (*range(0x20, 0x600), *range(0x2000, 0x2100), 0x1F600, 0x10FFFF)]
    tokens, mask = clip.encode(symbols)
    assert (tokens[mask] == clip.end_id).sum() == len(symbols)  # the end is what transformers takes for unknown
    words = [symbol for symbol, real in zip(symbols, mask, strict=True) if real.sum() > 2]
    assert len(words) > len(symbols) - 40  # the others are white space
    assert "\ufffd" not in "".join(clip.decode(tokens))


def test_clip_s_length_and_padding(clip):
    short = ClipTokenizer(clip.vocab_path, max_length=7, pad_token="!")
    tokens, mask = short.encode(["a photo of a cat", "a cat"])
    check_layout(short, tokens, mask)
    assert tokens[1, -1] == short.pad_id == 0
    assert short.decode(tokens) == ["a photo of a cat", "a cat"]
    with pytest.raises(JaxdiffError, match=r"is 8 tokens long with begin and end, and 7 are allowed"):
        short.encode(["a photo of a cat."])
    assert short.decode(short.encode(["a photo of a cat."], truncate=True).tokens) == ["a photo of a cat"]


def test_padding_and_truncation_that_a_file_asks_for_are_not_done_twice(tmp_path):
    state = json.loads((VOCABULARY / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "x"}
    state["padding"] = padding | {"strategy": {"Fixed": 50}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    got = ClipTokenizer(tmp_path).encode(TEXTS)
    np.testing.assert_array_equal(got.tokens, ClipTokenizer(VOCABULARY).encode(TEXTS).tokens)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(24), ClipTokenizer(VOCABULARY, 24)], ids=["bytes", "clip"])
def test_a_tokenizer_is_data_and_feeds_the_text_model(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert hash(copy) == hash(tokenizer)
    assert copy.vocab_size == tokenizer.vocab_size
    model = CLIPTextModel(
        tokenizer.vocab_size, 16, 16, 1, 2, max_length=tokenizer.max_length, eos_token_id=tokenizer.end_id
    )
    tokens, mask = tokenizer.encode(["a red square", ""])
    hidden, pooled = jax.jit(lambda *args: model.apply(model.init(jax.random.key(0), *args), *args))(tokens, mask)
    assert hidden.shape == (2, 24, 16)
    ends = mask.sum(1) - 1
    np.testing.assert_array_equal(pooled, hidden[np.arange(2), ends])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ClipTokenizer(VOCABULARY)], ids=["bytes", "clip"])
def test_what_is_not_a_list_of_texts_is_refused(tokenizer):
    with pytest.raises(JaxdiffError, match=r'write encode\(\["a cat"\]\)'):
        tokenizer.encode("a cat")
    with pytest.raises(JaxdiffError, match="number 1 is of type NoneType"):
        tokenizer.encode(["a cat", None])
    with pytest.raises(JaxdiffError, match="text 0 is not valid Unicode"):
        tokenizer.encode(["\ud800"])


def test_no_room_for_begin_and_end_is_refused():
    with pytest.raises(JaxdiffError, match="max_length must be 2 or more"):
        ByteTokenizer(1)
    with pytest.raises(JaxdiffError, match="max_length must be 2 or more"):
        ClipTokenizer(VOCABULARY, 1)


def test_a_missing_vocabulary_is_told(tmp_path):
    needed = r"needs tokenizer.json, or both vocab.json and merges.txt, as .* on huggingface.co"
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(JaxdiffError, match=f"there is no CLIP vocabulary in .*{needed}"):
            ClipTokenizer(path)
    shutil.copy(VOCABULARY / "vocab.json", tmp_path)
    with pytest.raises(JaxdiffError, match=f"there is no CLIP vocabulary in .*{needed}"):
        ClipTokenizer(tmp_path)
    with pytest.raises(JaxdiffError, match=f"cannot be read .*{needed}"):
        ClipTokenizer(tmp_path / "vocab.json")
    with pytest.raises(JaxdiffError, match='no token "<pad>" to pad with'):
        ClipTokenizer(VOCABULARY, pad_token="<pad>")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_file_cut_short_is_told(name, kept, tmp_path):
    if name == "tokenizer.json":
        shutil.copy(VOCABULARY / name, tmp_path)
    else:
        copy_two_files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(JaxdiffError, match=r"cannot be read|does not fit"):
        ClipTokenizer(tmp_path)


def test_a_vocabulary_of_another_kind_is_told(tmp_path):
    copy_two_files(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    del vocab["<|startoftext|>"], vocab["~"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(JaxdiffError, match="not CLIP's kind, for it lacks 2 of the 514 tokens"):
        ClipTokenizer(tmp_path)
