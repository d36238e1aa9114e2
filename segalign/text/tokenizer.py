"""The CLIP byte-pair tokenizer, offline, and the text cleaning that the original one applies."""

import gzip
import html
import re
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from segalign.errors import DataError

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408

TokenIds = tuple[int, ...]
# What happens to a text before it is tokenized: see `clean_text`.
TextCleaning = Literal["none", "ftfy", "open_clip"]

_VOCAB_FILE = "bpe_simple_vocab_16e6.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Characters that cleaning leaves alone: printable ASCII without "&" (HTML entities), tab, newline.
_PLAIN = re.compile(r"[\t\n\x20-\x25\x27-\x7e]*")


def clip_tokenizer(pad_token: str = _END) -> CLIPTokenizer:
    """Build the tokenizer of OpenAI's CLIP from the vocabulary that ``open_clip`` ships.

    Nothing is downloaded and ``open_clip`` itself is not imported.

    Args:
        pad_token: Token of the padding: the end token (49407) as in Stable Diffusion 1.5, or
            ``"!"`` (id 0) as in Stable Diffusion 2.

    Returns:
        A tokenizer of 49408 entries; start 49406, end 49407; ``model_max_length`` 77. It does not
        clean its input: see :func:`clean_text`.

    Raises:
        DataError: If the installed ``open_clip`` has no vocabulary file.
    """
    alphabet = _byte_alphabet()
    num_merges = VOCAB_SIZE - 2 * len(alphabet) - 2
    lines = gzip.decompress(_vocab_path().read_bytes()).decode().split("\n")
    merges = [(first, second) for first, second in map(str.split, lines[1 : num_merges + 1])]
    words = [*alphabet, *(char + "</w>" for char in alphabet), *map("".join, merges), _START, _END]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated as words, read as pairs
        pad_token=pad_token,
        model_max_length=CONTEXT_LENGTH,
    )


def clean_text(text: str, cleaning: TextCleaning = "ftfy") -> str:
    """Repair text as a model's own tokenizer does before it splits words.

    Args:
        text: Any text.
        cleaning: ``ftfy`` makes curly quotes straight, full-width letters narrow and HTML entities
            characters, and drops control characters, as Stable Diffusion's tokenizer does.
            ``open_clip`` also unescapes HTML that is escaped twice or stands beside ``<``, as
            OpenAI's CLIP and ``open_clip`` do. ``none`` leaves the text, as the fast tokenizers of
            transformers do.

    Returns:
        The text; lone surrogates have become U+FFFD, so that it can always be encoded.
    """
    if _PLAIN.fullmatch(text):
        return text
    if cleaning == "none":
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    fixed: str = ftfy.fix_text(text)
    if cleaning == "ftfy":
        return fixed
    # Lower case here, because the tokenizer's own knows no final sigma.
    return " ".join(html.unescape(html.unescape(fixed)).split()).lower()


def word_token_ids(
    text: str, tokenizer: CLIPTokenizer, cleaning: TextCleaning = "ftfy"
) -> TokenIds:
    """Tokenize cleaned text without start, end, padding and truncation.

    The names of special tokens (``<|endoftext|>``) inside a text are ordinary words here.
    """
    # One text at a time: as fast as a batch, and it starts no threads that a later fork would meet.
    backend = _plain_backend(tokenizer)
    return tuple(backend.encode(clean_text(text, cleaning), add_special_tokens=False).ids)


def char_token_positions(caption: str, tokenizer: CLIPTokenizer) -> NDArray[np.int64]:
    """Find the token that each character of a caption falls into.

    The caption is tokenized whole, as a truncating encoder does. A fact about the characters
    ``start:end`` needs the tokens up to ``positions[start:end].max()``; a context of 77 keeps the
    positions up to 75 of a longer caption (76 holds the end token).

    Args:
        caption: Text that cleaning does not change.
        tokenizer: The tokenizer.

    Returns:
        Token positions, int64 ``(len(caption),)``. 1 is the first token after the start token. A
        character of several tokens has the position of the last one; a blank that of the token
        after it, and trailing blanks that of the last token (0 if there is none).

    Raises:
        DataError: If cleaning changes the caption, because positions would then be wrong.
    """
    cleaned = clean_text(caption)
    if cleaned != caption:
        pairs = enumerate(zip_longest(caption, cleaned))
        changed = next(index for index, (before, after) in pairs if before != after)
        raise DataError(
            "token positions need a caption that text cleaning leaves unchanged; "
            f"character {changed} of {caption[:40]!r} changes; pass the result of `clean_text`"
        )
    encoding = _plain_backend(tokenizer).encode(caption, add_special_tokens=False)
    positions = np.zeros(len(caption), dtype=np.int64)
    for position, (start, end) in enumerate(encoding.offsets, start=1):
        positions[start:end] = position
    return _fill_gaps(positions, last=len(encoding.ids))


def _fill_gaps(positions: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Give each zero the next non-zero position, trailing zeros ``last``."""
    filled = np.where(positions > 0, positions, last)
    return np.minimum.accumulate(filled[::-1])[::-1]


def _plain_backend(tokenizer: CLIPTokenizer) -> Tokenizer:
    """Return the Rust tokenizer, set to neither cut nor pad nor know special tokens."""
    # The Python wrapper sets all three again in each of its own calls.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _byte_alphabet() -> list[str]:
    """List the 256 characters that stand for bytes: the printable ones first, then substitutes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *map(chr, range(0x100, 0x200 - len(printable)))]


def _vocab_path() -> Path:
    """Locate the vocabulary file inside the ``open_clip`` package."""
    spec = find_spec("open_clip")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (path := Path(folder) / _VOCAB_FILE).is_file():
            return path
    raise DataError(
        f"the package `open_clip` was expected to hold `{_VOCAB_FILE}`; it does not; "
        "reinstall `open_clip_torch`"
    )
