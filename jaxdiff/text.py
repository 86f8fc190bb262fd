"""Texts in: tokenizers turn them into integers for a text model, all of one length, and back.

    tokenizer = ByteTokenizer(max_length=64)
    model = CLIPTextModel(tokenizer.vocab_size, max_length=tokenizer.max_length, eos_token_id=tokenizer.end_id)
    tokens, mask = tokenizer.encode(["a red square", ""])
    hidden, pooled = model.apply(params, tokens, mask)

The empty text, which classifier-free guidance asks for, is the begin token and the end token.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxdiff.errors import JaxdiffError

if TYPE_CHECKING:
    import tokenizers

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # closes the last token of each word in CLIP's vocabulary
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
NEEDED = (
    'tokenizer.json, or both vocab.json and merges.txt, as the folder "tokenizer" of a Stable Diffusion repository and '
    "the repository openai/clip-vit-large-patch14 on huggingface.co have them"
)


class Tokens(NamedTuple):
    """Texts as integers, padded to one length; the mask is True at what is not padding."""

    tokens: Int[np.ndarray, "B L"]
    mask: Bool[np.ndarray, "B L"]


class Tokenizer(Protocol):
    """What a text model and its data need of a tokenizer."""

    vocab_size: int
    """Tokens are 0 ... vocab_size - 1."""
    max_length: int
    """The length L that every text is padded to, begin and end included."""
    begin_id: int
    end_id: int
    pad_id: int

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> Tokens:
        """Turn texts into tokens int32 [B, L] and mask bool [B, L]: begin, the text, end, then padding.

        Raises JaxdiffError where a text is longer than L - 2 tokens; `truncate` cuts it to that instead.
        """

    def decode(self, tokens: Int[np.ndarray, "B L"]) -> list[str]:
        """Turn tokens back into the texts between begin and end."""


@dataclass(frozen=True)
class ByteTokenizer:
    """A token a byte of UTF-8: any text, no vocabulary to fetch, and `decode` undoes `encode` exactly.

    Tokens 0 ... 255 are the bytes, 256 is the begin, 257 the end, 258 the padding. A letter beyond ASCII takes two to
    four of them; where `truncate` cuts one in two, its first half is decoded as U+FFFD.
    """

    max_length: int = 77

    begin_id = 256
    end_id = 257
    pad_id = 258
    vocab_size = 259

    def __post_init__(self):
        """Raise JaxdiffError where there is no room for begin and end."""
        _check_length(self.max_length)

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> Tokens:
        """Turn texts into tokens int32 [B, L] and mask bool [B, L]: begin, the bytes, end, then padding.

        Raises JaxdiffError where a text is longer than L - 2 bytes; `truncate` cuts it to that instead.
        """
        return _pack(self, _checked(texts), str.encode, truncate)

    def decode(self, tokens: Int[np.ndarray, "B L"]) -> list[str]:
        """Turn tokens back into the texts between begin and end."""
        return [bytes(i for i in row if i < 256).decode(errors="replace") for row in _unpack(self, tokens)]


@dataclass(frozen=True)
class ClipTokenizer:
    """The byte-pair encoding of CLIP (Radford et al. 2021) from a vocabulary on disk, as transformers' CLIPTokenizer.

    Texts are brought to Unicode's form NFC, white space to single spaces, and letters to lower case; then cut into
    words, single digits, runs of punctuation and English endings such as 's, and each of those into the tokens that
    the vocabulary's merges make of its bytes. All 256 bytes are tokens themselves, so no symbol is unknown. The names
    <|startoftext|> and <|endoftext|> within a text mean these tokens. HTML and broken encodings are left as they are,
    as transformers does; OpenAI's own code repairs both.

    vocab_path: tokenizer.json, or a folder that holds it or else vocab.json and merges.txt.
    max_length: the length of every sequence, begin and end included; the published models have 77 positions.
    pad_token: what fills a sequence: the end token in CLIP and Stable Diffusion 1, "!" in Stable Diffusion 2.
    """

    vocab_path: str | PathLike
    max_length: int = 77
    pad_token: str = END

    def __post_init__(self):
        """Read the vocabulary; JaxdiffError where it is not there, is damaged or is not CLIP's kind."""
        _check_length(self.max_length)
        if self.pad_id is None:
            raise JaxdiffError(f'the vocabulary in {self.vocab_path} has no token "{self.pad_token}" to pad with')

    @cached_property
    def _bpe(self) -> "tokenizers.Tokenizer":
        return _read_vocabulary(Path(self.vocab_path).expanduser())

    @cached_property
    def vocab_size(self) -> int:
        """The highest id and one: 49408 for the published vocabulary."""
        return max(self._bpe.get_vocab().values()) + 1

    @property
    def begin_id(self) -> int:
        """The id of <|startoftext|>: 49406 in the published vocabulary."""
        return self._bpe.token_to_id(BEGIN)

    @property
    def end_id(self) -> int:
        """The id of <|endoftext|>: 49407 in the published vocabulary."""
        return self._bpe.token_to_id(END)

    @property
    def pad_id(self) -> int:
        """The id of `pad_token`."""
        return self._bpe.token_to_id(self.pad_token)

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> Tokens:
        """Turn texts into tokens int32 [B, L] and mask bool [B, L]: begin, the text, end, then padding.

        Raises JaxdiffError where a text is longer than L - 2 tokens; `truncate` cuts it to that instead.
        """
        split = lambda text: self._bpe.encode(text, add_special_tokens=False).ids  # noqa: E731
        return _pack(self, _checked(texts), split, truncate)

    def decode(self, tokens: Int[np.ndarray, "B L"]) -> list[str]:
        """Turn tokens back into the texts between begin and end, lower case, with a space after each word."""
        return [self._bpe.decode(row).replace(WORD_END, " ").strip() for row in _unpack(self, tokens)]


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise JaxdiffError(f"max_length must be 2 or more, for a begin and an end token, not {max_length}")


def _checked(texts: Sequence[str]) -> Sequence[str]:
    """Refuse what would be taken apart letter by letter, and what has no UTF-8."""
    if isinstance(texts, str):
        raise JaxdiffError(f'encode needs a list of texts, not one text: write encode(["{_excerpt(texts)}"])')
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise JaxdiffError(f"encode needs texts, and number {i} is of type {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JaxdiffError(f"text {i} is not valid Unicode ({error.reason}): give it as UTF-8") from error
    return texts


def _excerpt(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _pack(tokenizer: Tokenizer, texts: Sequence[str], split, truncate: bool) -> Tokens:
    """Put begin and end around what `split` makes of each text, and pad."""
    length = tokenizer.max_length
    tokens = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for i, text in enumerate(texts):
        row = [tokenizer.begin_id, *split(text), tokenizer.end_id]
        if len(row) > length:
            if not truncate:
                raise JaxdiffError(
                    f'text {i} ("{_excerpt(text)}") is {len(row)} tokens long with begin and end, and {length} are '
                    "allowed: shorten it, or encode with truncate=True to have its end cut off"
                )
            row[length - 1 :] = [tokenizer.end_id]
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(tokens, mask)


def _unpack(tokenizer: Tokenizer, tokens: Int[np.ndarray, "B L"]) -> list[list[int]]:
    """The tokens of each row up to the first end, without the begin."""
    rows = []
    for row in np.asarray(tokens).tolist():
        row = row[: row.index(tokenizer.end_id)] if tokenizer.end_id in row else row
        rows.append([i for i in row if i != tokenizer.begin_id])
    return rows


def _read_vocabulary(path: Path) -> "tokenizers.Tokenizer":
    """Read a CLIP tokenizer from tokenizer.json, or from a folder with that or with vocab.json and merges.txt."""
    if importlib.util.find_spec("tokenizers") is None:
        raise JaxdiffError("CLIP's tokenizer needs the package tokenizers: pip install 'jaxdiff[clip]'.")
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            bpe = tokenizers.Tokenizer.from_file(str(file))
            bpe.no_padding()
            bpe.no_truncation()
        elif vocab.is_file() and merges.is_file():
            bpe = _build(*tokenizers.models.BPE.read_file(str(vocab), str(merges)))
        else:
            raise JaxdiffError(f"there is no CLIP vocabulary in {path}: it needs {NEEDED}")
    except JaxdiffError:
        raise
    except Exception as error:  # the library has no exceptions of its own
        raise JaxdiffError(f"the CLIP vocabulary in {path} cannot be read ({error}): it needs {NEEDED}") from error
    wanted = _smallest_vocabulary()
    if missing := wanted - bpe.get_vocab().keys():
        raise JaxdiffError(
            f"the vocabulary in {path} is not CLIP's kind, for it lacks {len(missing)} of the {len(wanted)} tokens for "
            f"begin, end and single bytes: it needs {NEEDED}"
        )
    return bpe


def _smallest_vocabulary() -> set[str]:
    """The tokens of a CLIP vocabulary without merges: begin, end, and each byte within and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {BEGIN, END}.union(*({byte, byte + WORD_END} for byte in ByteLevel.alphabet()))


def _build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    """What transformers' CLIPTokenizer builds of a vocabulary and its merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    unmade = vocab.keys() - _smallest_vocabulary() - {a + b for a, b in merges}
    if unmade:  # a file that was cut short would else go unnoticed and give other tokens
        raise JaxdiffError(
            f"merges.txt does not fit vocab.json, {len(unmade)} of whose {len(vocab)} tokens no merge makes: fetch "
            "both files again"
        )
    bpe = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=WORD_END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END) if token in vocab])
    return bpe
