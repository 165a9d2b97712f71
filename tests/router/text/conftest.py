"""Small real tokenizers, trained here: a byte-level BPE and one of the Metaspace kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog\n" * 3, "naïve café 世界 🎉 👩‍👩‍👧‍👦 한국어 日本語"]


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """GPT-2's kind, with two special tokens and an added one that is text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<thïnk> 世", special=False)])
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    """Llama-2's kind: words begin with a mark, unknown characters are byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS[:1], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] == "<unk>"  # Byte tokens are ordinary ones.
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture
def folder(tmp_path: Path, byte_level: Tokenizer) -> Path:
    """A Hugging Face folder with the byte-level tokenizer and nothing else."""
    byte_level.save(str(tmp_path / "tokenizer.json"))
    return tmp_path
