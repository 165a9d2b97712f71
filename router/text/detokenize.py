"""Token ids to text, one token at a time.

For a byte-level BPE a table is exact and costs nothing (0.02 us a token; the library 0.6 to 1): each id has its bytes, and
only a character split across tokens needs a decoder with memory. Every other tokenizer goes through the library.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

import msgspec
from tokenizers import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")
_encode_json = msgspec.json.Encoder().encode
# Line ends to `str.splitlines`, which some clients cut an event stream with; JSON itself leaves them as they are.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
PROMPT_TAIL_TOKENS = 8
CHARACTER_TOKENS_MAX = 8  # A character has 4 bytes at most; more tokens without one are broken UTF-8.


def escape(text: str) -> bytes:
    """The text as it stands between the quotes of a JSON string."""
    escaped = _encode_json(text)[1:-1]
    if not text.isascii() and any(end in text for end in _LINE_ENDS):
        for end, escape_sequence in _LINE_ENDS.items():
            escaped = escaped.replace(end.encode(), escape_sequence.encode())
    return escaped


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable character -> byte (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + count): byte for count, byte in enumerate(others)})
    return alphabet


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's decoder is GPT-2's byte alphabet and nothing else, so that a table is exact."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    return decoder is not None and decoder["type"] == "ByteLevel"


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens without text, as `decode(skip_special_tokens=True)` sees it."""
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class TokenTable:
    """For each id of a byte-level BPE: its bytes, its text and its escaped text (None where it is not whole UTF-8).

    Special tokens have no text, as in `decode(skip_special_tokens=True)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        alphabet = _byte_of_character()
        special = special_ids(tokenizer)
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.raw: list[bytes] = []
        self.text: list[str | None] = []
        self.escaped: list[bytes | None] = []
        for token_id in range(size):
            token = tokenizer.id_to_token(token_id)
            raw = b"" if token is None or token_id in special else _raw(token, alphabet)
            text = _whole(raw)
            self.raw.append(raw)
            self.text.append(text)
            self.escaped.append(None if text is None else escape(text))
        self.size = size


def _raw(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()  # An added token is written as it is read.


def _whole(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


class Detokenizer(Protocol):
    """One stream's way from ids to text. All pieces and the flush together are the whole text."""

    @property
    def is_whole(self) -> bool:
        """Nothing is kept back: the next token's text does not depend on the ones before."""

    def text(self, token_id: int) -> str:
        """What the token adds; "" while a character is incomplete, and for an id that the tokenizer does not have."""

    def flush(self) -> str:
        """What is left at the end: an incomplete character as U+FFFD."""


class TableDetokenizer:
    """The table, with a UTF-8 decoder only while a character is split."""

    __slots__ = ("_table", "_utf8")

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._utf8: codecs.IncrementalDecoder | None = None

    @property
    def is_whole(self) -> bool:
        return self._utf8 is None

    def text(self, token_id: int) -> str:
        table = self._table
        if not 0 <= token_id < table.size:
            return ""
        if self._utf8 is None:
            text = table.text[token_id]
            if text is not None:
                return text
            self._utf8 = _Utf8("replace")
        text = self._utf8.decode(table.raw[token_id])
        if not self._utf8.getstate()[0]:
            self._utf8 = None
        return text

    def flush(self) -> str:
        if self._utf8 is None:
            return ""
        text, self._utf8 = self._utf8.decode(b"", True), None
        return text


class LibraryDetokenizer:
    """Any tokenizer: decodes a short window again with each token and shows what is new at its end, as TGI and vLLM do.

    (The library's `DecodeStream` raises on broken UTF-8 and keeps an incomplete character for ever.) The window begins with the
    prompt's last tokens: whether the first word keeps its space depends on them.
    """

    is_whole = False

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._window = [token_id for token_id in prompt_tail if token_id not in special_ids]
        self._shown_ids = len(self._window)  # of the window, already shown: what comes before the new text
        self._shown = self._decode(self._window)

    def text(self, token_id: int) -> str:
        # Without text, and what follows must see the text before them.
        if token_id in self._special_ids or token_id < 0 or self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        decoded = self._decode(self._window)
        if decoded.endswith("\ufffd") and len(self._window) - self._shown_ids < CHARACTER_TOKENS_MAX:
            return ""
        text = decoded[len(self._shown) :]
        if text:
            self._window = self._window[self._shown_ids :]
            self._shown_ids = len(self._window)
            self._shown = self._decode(self._window)
        return text

    def flush(self) -> str:
        return self._decode(self._window)[len(self._shown) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
