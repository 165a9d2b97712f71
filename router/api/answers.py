"""What an answer looks like on the wire: event streams and whole bodies, for chat and for completions.

An answer has one or more choices, each the `stream.TextWriter` of one generation. Chunk heads and tails are made once:
what a token costs is the bytes between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from ..control_messages import Receipt
from ..generation import Failure
from ..text.detokenize import escape
from ..text.model_text import ModelText
from .errors import failure_event
from .sink import Sink
from .stream import ShownToken

_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
LOGPROB_MIN = -9999.0  # JSON has no infinity; as in vLLM.


class AnswerShape:
    """What every chunk and body of one answer has in common."""

    def __init__(
        self,
        request_id: str,
        model: str,
        text: ModelText,
        *,
        is_chat: bool,
        includes_usage: bool,
        prompt_tokens: int,
        top_logprobs: int = 0,
    ) -> None:
        self.receipts: Callable[[], list[Receipt]] | None = None  # of its generations, for a client that asked
        self.is_chat = is_chat
        self.includes_usage = includes_usage
        self._text = text
        self._prompt_tokens = prompt_tokens
        self._top_logprobs = top_logprobs
        whole, part = ("chat.completion", "chat.completion.chunk") if is_chat else ("text_completion",) * 2
        answer_id = ("chatcmpl-" if is_chat else "cmpl-") + request_id
        self.start: dict[str, object] = {
            "id": answer_id,
            "object": whole,
            "created": int(time.time()),
            "model": model,
        }
        self.chunk_start = b'data: %b,"choices":[' % _json({**self.start, "object": part})[:-1]
        self.chunk_end = b'],"usage":null}\n\n' if includes_usage else b"]}\n\n"

    def usage(self, output_tokens: int) -> dict[str, int]:
        """Tokens of the whole answer, all choices together."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": self._prompt_tokens + output_tokens,
        }

    def explanation(self) -> bytes:
        """A comment, which every reader of server-sent events skips; empty unless the client asked."""
        return b": hocket %b\n\n" % _json({"receipts": self.receipts()}) if self.receipts is not None else b""

    def logprobs(self, shown: Sequence[ShownToken], text_offset: int) -> dict[str, object]:
        """OpenAI's object for the log probabilities of some tokens; `text_offset` counts characters before the first one."""
        if self.is_chat:
            return {"content": [self._chat_logprob(token) for token in shown], "refusal": None}
        words = [self._word(token.token_id) for token in shown]
        offsets = []
        for word in words:
            offsets.append(text_offset)
            text_offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [max(token.logprob.logprob, LOGPROB_MIN) for token in shown],
            "top_logprobs": [self._completion_top(token) for token in shown],
            "text_offset": offsets,
        }

    def text_length(self, shown: Sequence[ShownToken]) -> int:
        """Characters of the tokens as `logprobs` shows them."""
        return sum(len(self._word(token.token_id)) for token in shown)

    def _word(self, token_id: int) -> str:
        return self._text.token_bytes(token_id).decode("utf-8", "replace")

    def _completion_top(self, token: ShownToken) -> dict[str, float] | None:
        if not self._top_logprobs:
            return None
        # The chosen token is always there, likely or not.
        top = [*token.logprob.top[: self._top_logprobs], (token.token_id, token.logprob.logprob)]
        return {self._word(token_id): max(logprob, LOGPROB_MIN) for token_id, logprob in top}

    def _chat_logprob(self, token: ShownToken) -> dict[str, object]:
        top = [self._one_logprob(*item) for item in token.logprob.top[: self._top_logprobs]]
        return {**self._one_logprob(token.token_id, token.logprob.logprob), "top_logprobs": top}

    def _one_logprob(self, token_id: int, logprob: float) -> dict[str, object]:
        raw = self._text.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOGPROB_MIN), "bytes": list(raw)}


class EventStream:
    """A streamed answer: server-sent events into one sink, which may come after the first tokens."""

    def __init__(self, shape: AnswerShape, choices: int, on_failed: Callable[[], None]) -> None:
        self.shape = shape
        self.failure: Failure | None = None
        self._sink: Sink | None = None
        self._early: list[bytes] = []
        self._open = choices
        self._output_tokens = 0
        self._is_over = False
        self._on_failed = on_failed

    @property
    def is_failed_unseen(self) -> bool:
        """It failed before there was anything to show: an HTTP status can still say so."""
        return self.failure is not None and len(self._early) == 1

    def choice(self, index: int, echo: str = "") -> EventChoice:
        """The writer of one choice; `echo` is text that comes before the answer's own."""
        return EventChoice(self, index, echo)

    def attach(self, sink: Sink) -> None:
        """Write from now on, and what came before."""
        self._sink = sink
        if self._early:
            sink.write(b"".join(self._early), is_last=self._is_over)
            self._early.clear()

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """One or more whole events."""
        if self._is_over:
            return
        self._is_over = is_last
        if self._sink is not None:
            self._sink.write(body, is_last=is_last)
        else:
            self._early.append(body)

    def end_choice(self, body: bytes, output_tokens: int) -> None:
        """A choice's last event; after the last choice the usage and the end."""
        self._open -= 1
        self._output_tokens += output_tokens
        if self._open:
            self.write(body)
            return
        if self.shape.includes_usage:
            body += b'%b],"usage":%b}\n\n' % (self.shape.chunk_start, _json(self.shape.usage(self._output_tokens)))
        self.write(body + self.shape.explanation() + DONE, is_last=True)

    def fail(self, failure: Failure) -> None:
        """One error event ends the whole answer."""
        if not self._is_over:
            self.failure = failure
            self.write(self.shape.explanation() + failure_event(failure), is_last=True)
            self._on_failed()


class EventChoice:
    """One choice of an `EventStream`."""

    __slots__ = ("_answer", "_first", "_head", "_index", "_tail", "_text_offset")

    def __init__(self, answer: EventStream, index: int, echo: str) -> None:
        shape = answer.shape
        self._answer = answer
        self._index = index
        self._first = (
            b""  # Goes out with the first text, not before it: clients take the first event for the first token.
        )
        self._text_offset = 0
        if shape.is_chat:
            self._head = b'%b{"index":%d,"delta":{"content":"' % (shape.chunk_start, index)
            self._tail = b'"},"logprobs":null,"finish_reason":null}' + shape.chunk_end
            self._first = b'%b{"index":%d,"delta":{"role":"assistant","content":"%b' % (
                shape.chunk_start, index, self._tail,
            )  # fmt: skip
        else:
            self._head = b'%b{"index":%d,"text":"' % (shape.chunk_start, index)
            self._tail = b'","logprobs":null,"finish_reason":null}' + shape.chunk_end
            if echo:
                self._first = self._head + escape(echo) + self._tail

    def write(self, parts: list[bytes], logprobs: Sequence[ShownToken]) -> None:
        """Pieces of escaped text."""
        text = parts[0] if len(parts) == 1 else b"".join(parts)
        if logprobs or self._first:
            self._answer.write(self._chunk(text, logprobs, b"null"))
        else:
            self._answer.write(b"%b%b%b" % (self._head, text, self._tail))

    def end(self, parts: list[bytes], logprobs: Sequence[ShownToken], finish_reason: str, output_tokens: int) -> None:
        """The last text and its reason."""
        chunk = self._chunk(b"".join(parts), logprobs, b'"%b"' % finish_reason.encode())
        self._answer.end_choice(chunk, output_tokens)

    def fail(self, failure: Failure) -> None:
        """There will be no more."""
        self._answer.fail(failure)

    def _chunk(self, text: bytes, logprobs: Sequence[ShownToken], reason: bytes) -> bytes:
        first, self._first = self._first, b""
        shape = self._answer.shape
        shown = b"null"
        if logprobs:
            shown = _json(shape.logprobs(logprobs, self._text_offset))
            self._text_offset += shape.text_length(logprobs)
        close = b'"}' if shape.is_chat else b'"'
        return b'%b%b%b%b,"logprobs":%b,"finish_reason":%b}%b' % (
            first, self._head, text, close, shown, reason, shape.chunk_end,
        )  # fmt: skip


class WholeAnswer:
    """An answer that is sent when all of its choices have ended."""

    def __init__(self, shape: AnswerShape, choices: int, on_done: Callable[[], None]) -> None:
        self.shape = shape
        self.failure: Failure | None = None
        self._choices: list[WholeChoice] = []
        self._open = choices
        self._on_done = on_done

    def choice(self, index: int, echo: str = "") -> WholeChoice:
        """The writer of one choice; they are made in the order of their indexes."""
        choice = WholeChoice(self, index, echo)
        self._choices.append(choice)
        return choice

    def end_choice(self) -> None:
        """A choice has ended."""
        self._open -= 1
        if not self._open and self.failure is None:
            self._on_done()

    def fail(self, failure: Failure) -> None:
        """The first failure is the answer."""
        if self.failure is None and self._open:
            self.failure = failure
            self._on_done()

    def body(self) -> bytes:
        """The JSON of the whole answer."""
        shape = self.shape
        return _json(
            {
                **shape.start,
                "choices": [choice.json() for choice in self._choices],
                "usage": shape.usage(sum(choice.output_tokens for choice in self._choices)),
                **({"hocket": {"receipts": shape.receipts()}} if shape.receipts is not None else {}),
            }
        )


class WholeChoice:
    """One choice of a `WholeAnswer`."""

    __slots__ = ("_answer", "_finish_reason", "_index", "_logprobs", "_parts", "output_tokens")

    def __init__(self, answer: WholeAnswer, index: int, echo: str) -> None:
        self.output_tokens = 0
        self._index = index
        self._answer = answer
        self._parts: list[bytes] = [escape(echo)] if echo else []
        self._logprobs: list[ShownToken] = []
        self._finish_reason = ""

    def write(self, parts: list[bytes], logprobs: Sequence[ShownToken]) -> None:
        """Keep them."""
        self._parts += parts
        self._logprobs += logprobs

    def end(self, parts: list[bytes], logprobs: Sequence[ShownToken], finish_reason: str, output_tokens: int) -> None:
        """Complete."""
        self.write(parts, logprobs)
        self._finish_reason, self.output_tokens = finish_reason, output_tokens
        self._answer.end_choice()

    def fail(self, failure: Failure) -> None:
        """The whole answer fails."""
        self._answer.fail(failure)

    def json(self) -> dict[str, object]:
        """OpenAI's object for a choice."""
        content = msgspec.Raw(b'"%b"' % b"".join(self._parts))
        shape = self._answer.shape
        logprobs = shape.logprobs(self._logprobs, 0) if self._logprobs else None
        end = {"logprobs": logprobs, "finish_reason": self._finish_reason}
        if shape.is_chat:
            return {"index": self._index, "message": {"role": "assistant", "content": content, "refusal": None}, **end}
        return {"index": self._index, "text": content, **end}
