"""Everything a router knows of a model: its text side, read from a Hugging Face folder without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .detokenize import (
    PROMPT_TAIL_TOKENS,
    Detokenizer,
    LibraryDetokenizer,
    TableDetokenizer,
    TokenTable,
    is_byte_level,
    special_ids,
)
from .template import ChatTemplate, TemplateFailed
from .tokenize import PromptTokenizer


class ModelTextError(Exception):
    """The folder cannot be used; the text says what is wrong with which file."""


class ModelText:
    """One model's tokenizer, chat template and limits."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, context_tokens: int | None) -> None:
        self.context_tokens = context_tokens  # prompt and output together; None: the folder does not say
        self.eos_ids: frozenset[int] = frozenset()
        self.table = TokenTable(tokenizer) if is_byte_level(tokenizer) else None
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.prompts = PromptTokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._special_ids = special_ids(tokenizer)
        self._template = template
        self._token_characters_max = _token_characters_max(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> ModelText:
        """Read `folder`; raises ModelTextError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelTextError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise ModelTextError(f"cannot read {path}: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        source = _template_source(folder, settings)
        try:
            template = None if source is None else ChatTemplate(source, _special_tokens(settings))
        except TemplateFailed as error:
            raise ModelTextError(f"{folder}: {error}") from error
        text = cls(tokenizer, template, _context_tokens(model))
        text.eos_ids = _eos_ids(_read_json(folder / "generation_config.json"), model)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt that a chat stands for. Raises TemplateFailed."""
        if self._template is None:
            raise TemplateFailed("the model has no chat template; use /v1/completions")
        return self._template.render(messages)

    async def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The ids of each text; special tokens in a text are read as such, as transformers does. Raises TokenizerBusy."""
        return await self.prompts.encode(texts, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text at once."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A fresh one for one stream."""
        if self.table is not None:
            return TableDetokenizer(self.table)
        return LibraryDetokenizer(self._tokenizer, self._special_ids, prompt_ids[-PROMPT_TAIL_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """One token as it stands alone, special tokens by their name: what log probabilities are shown with."""
        raw = self.table.raw[token_id] if self.table is not None and 0 <= token_id < self.table.size else b""
        if raw:
            return raw
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode() if token_id >= 0 else b""

    def tokens_min(self, text: str) -> int:
        """So many tokens it has at least, without tokenizing it."""
        return -(-len(text) // self._token_characters_max) if self._token_characters_max else 0

    def close(self) -> None:
        """Stop the tokenizing threads."""
        self.prompts.close()


def _token_characters_max(tokenizer: Tokenizer) -> int | None:
    """The most characters of a prompt that one token can stand for; None where a normalizer or a token may swallow any number."""
    state = json.loads(tokenizer.to_str())
    if state["normalizer"] is not None or any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        return None
    # In the byte alphabet a token has one character for each byte, so at least one for each character of the text.
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)
    return longest if is_byte_level(tokenizer) else None


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelTextError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelTextError(f"{path} holds no JSON object")
    return content


def _template_source(folder: Path, settings: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # Several by name, as older folders have it.
        source = next((s.get("template") for s in source if isinstance(s, dict) and s.get("name") == "default"), None)
    return source if isinstance(source, str) else None


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and its like, which templates name; each is a string or the description of an added token."""
    tokens: dict[str, str] = {}
    for key, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def _context_tokens(model: Mapping[str, object]) -> int | None:
    inner = model.get("text_config")  # where multimodal models keep it
    for source in (model, inner if isinstance(inner, dict) else {}):
        length = source.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    return None


def _eos_ids(generation: Mapping[str, object], model: Mapping[str, object]) -> frozenset[int]:
    eos = generation.get("eos_token_id", model.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))
