"""Prompts to token ids: short ones at once, long ones in a thread, so that the event loop never stands still."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

INLINE_CHARACTERS_MAX = 4096  # about 1 ms
_THREADS = 2  # The library releases the GIL; more threads would only take the cores from the loop.
_WAITING_MAX = 64


class TokenizerBusy(Exception):
    """Too many long prompts wait for the tokenizer."""


class PromptTokenizer:
    """The encoding side of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # What a model's folder says about cutting and filling up was for training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        self._waiting = 0

    async def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The ids of each text. Raises TokenizerBusy."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS_MAX:
            return self._encode(texts, add_special_tokens)
        if self._waiting >= _WAITING_MAX:
            raise TokenizerBusy(f"{self._waiting} long prompts wait for the tokenizer")
        self._waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._encode, texts, add_special_tokens)
        work.add_done_callback(self._on_done)  # Not `finally`: a cancelled caller leaves the thread at work.
        return await work

    def _on_done(self, work: asyncio.Future[list[list[int]]]) -> None:
        self._waiting -= 1

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # The one without offsets, a quarter cheaper; one text a call, or the library spreads them over all cores.
        encode = self._tokenizer.encode_batch_fast
        return [encode([text], add_special_tokens=add_special_tokens)[0].ids for text in texts]

    def close(self) -> None:
        """Forget what waits; a text that is being encoded is finished in its thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)
