"""Which token ids the simulator makes: ordinary text of the model's tokenizer, so that its answers can be shown."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)


class _AddedToken(msgspec.Struct):
    id: int


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}  # BPE and WordPiece: ids by token; Unigram: in order of id


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


def sim_vocabulary(model: str, ids_without_tokenizer: int) -> range:
    """The longest run of ids without an added (special) token; 0..n-1 when `model` is no folder with a tokenizer."""
    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        return range(ids_without_tokenizer)
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_Tokenizer)
    except msgspec.MsgspecError as error:
        log.warning("could not read %s (%s): made token ids below %d", path, error, ids_without_tokenizer)
        return range(ids_without_tokenizer)
    vocab = tokenizer.model.vocab
    size = len(vocab) if isinstance(vocab, list) else max(vocab.values(), default=-1) + 1
    borders = sorted({-1, size, *(added.id for added in tokenizer.added_tokens if added.id < size)})
    runs = [range(before + 1, after) for before, after in zip(borders, borders[1:], strict=False)]
    return max(runs, key=len, default=range(0)) or range(ids_without_tokenizer)
