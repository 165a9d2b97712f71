"""What an answer looks like on the wire: event streams and whole bodies, for chat and for completions.

An answer has one or more choices, each the `stream.TextWriter` of one generation. Chunk heads and tails are made once:
what a token costs is the bytes between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ..generation import Failure
from ..text.model_text import ModelText
from .errors import failure_event
from .sink import Sink
from .stream import ShownToken

_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class AnswerShape:
    """What every chunk and body of one answer has in common."""

    answer_id: str
    model: str
    is_chat: bool
    includes_usage: bool
    prompt_tokens: int
    text: ModelText
    created: int = 0

    def __post_init__(self) -> None:
        self.created = self.created or int(time.time())

    @property
    def chunk_object(self) -> str:
        """OpenAI's name for a part of a stream."""
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def chunk_start(self, choices: bytes) -> bytes:
        """An event up to the end of its choices."""
        return b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[%b' % (
            _json(self.answer_id), self.chunk_object.encode(), self.created, _json(self.model), choices,
        )  # fmt: skip

    @property
    def chunk_end(self) -> bytes:
        """The rest of an event after its choices."""
        return b'],"usage":null}\n\n' if self.includes_usage else b"]}\n\n"

    def usage(self, output_tokens: int) -> dict[str, object]:
        """Tokens of the whole answer, all choices together."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": self.prompt_tokens + output_tokens,
        }

    def logprobs(self, shown: Sequence[ShownToken]) -> object:
        """OpenAI's object for log probabilities of some tokens."""
        if self.is_chat:
            return {"content": [self._chat_logprob(token) for token in shown], "refusal": None}
        words = [self._word(token.token_id) for token in shown]
        return {
            "tokens": words,
            "token_logprobs": [token.logprob.logprob for token in shown],
            "top_logprobs": [{self._word(i): p for i, p in token.logprob.top} for token in shown],
            "text_offset": [],
        }

    def _word(self, token_id: int) -> str:
        return self.text.token_bytes(token_id).decode("utf-8", "replace")

    def _chat_logprob(self, token: ShownToken) -> dict[str, object]:
        top = [self._one_logprob(token_id, logprob) for token_id, logprob in token.logprob.top]
        return {**self._one_logprob(token.token_id, token.logprob.logprob), "top_logprobs": top}

    def _one_logprob(self, token_id: int, logprob: float) -> dict[str, object]:
        raw = self.text.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class EventStream:
    """A streamed answer: server-sent events into one sink, which may come after the first tokens."""

    def __init__(self, shape: AnswerShape, choices: int, on_failed: Callable[[], None]) -> None:
        self.shape = shape
        self._sink: Sink | None = None
        self._early: list[tuple[bytes, bool]] = []
        self._open = choices
        self._output_tokens = 0
        self._is_over = False
        self._on_failed = on_failed

    def choice(self, index: int, echo: str = "") -> EventChoice:
        """The writer of one choice; `echo` is text that comes before the answer's own."""
        return EventChoice(self, index, echo)

    def attach(self, sink: Sink) -> None:
        """Write from now on, and what came before."""
        self._sink = sink
        for body, is_last in self._early:
            sink.write(body, is_last=is_last)
        self._early.clear()

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """One or more whole events."""
        if self._is_over:
            return
        self._is_over = is_last
        if self._sink is not None:
            self._sink.write(body, is_last=is_last)
        else:
            self._early.append((body, is_last))

    def end_choice(self, body: bytes, output_tokens: int) -> None:
        """A choice's last event; after the last choice the usage and the end."""
        self._open -= 1
        self._output_tokens += output_tokens
        if self._open:
            self.write(body)
            return
        if self.shape.includes_usage:
            usage = _json(self.shape.usage(self._output_tokens))
            body += b'%b],"usage":%b}\n\n' % (self.shape.chunk_start(b""), usage)
        self.write(body + DONE, is_last=True)

    def fail(self, failure: Failure) -> None:
        """One error event ends the whole answer."""
        if not self._is_over:
            self.write(failure_event(failure), is_last=True)
            self._on_failed()


class EventChoice:
    """One choice of an `EventStream`."""

    __slots__ = ("_answer", "_head", "_index", "_tail")

    def __init__(self, answer: EventStream, index: int, echo: str) -> None:
        shape = answer.shape
        self._answer = answer
        self._index = index
        if shape.is_chat:
            self._head = shape.chunk_start(b'{"index":%d,"delta":{"content":"' % index)
            self._tail = b'"},"logprobs":null,"finish_reason":null}' + shape.chunk_end
            first = (
                b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            )
            answer.write(shape.chunk_start(first) + shape.chunk_end)
        else:
            self._head = shape.chunk_start(b'{"index":%d,"text":"' % index)
            self._tail = b'","logprobs":null,"finish_reason":null}' + shape.chunk_end
            if echo:
                answer.write(self._head + _json(echo)[1:-1] + self._tail)

    def write(self, parts: list[bytes], logprobs: Sequence[ShownToken]) -> None:
        """Pieces of escaped text."""
        text = parts[0] if len(parts) == 1 else b"".join(parts)
        if logprobs:
            self._answer.write(self._chunk(text, logprobs, b"null"))
        else:
            self._answer.write(b"%b%b%b" % (self._head, text, self._tail))

    def end(self, parts: list[bytes], logprobs: Sequence[ShownToken], finish_reason: str, output_tokens: int) -> None:
        """The last text and its reason."""
        chunk = self._chunk(b"".join(parts), logprobs, b'"%b"' % finish_reason.encode())
        self._answer.end_choice(chunk, output_tokens)

    def fail(self, failure: Failure, output_tokens: int) -> None:
        """There will be no more."""
        self._answer.fail(failure)

    def _chunk(self, text: bytes, logprobs: Sequence[ShownToken], reason: bytes) -> bytes:
        shape = self._answer.shape
        shown = _json(shape.logprobs(logprobs)) if logprobs else b"null"
        close = b'"}' if shape.is_chat else b'"'
        return b'%b%b%b,"logprobs":%b,"finish_reason":%b}%b' % (self._head, text, close, shown, reason, shape.chunk_end)


class WholeAnswer:
    """An answer that is sent when all of its choices have ended."""

    def __init__(self, shape: AnswerShape, choices: int, on_done: Callable[[], None]) -> None:
        self.shape = shape
        self.failure: Failure | None = None
        self._choices: list[WholeChoice] = []
        self._open = choices
        self._on_done = on_done

    def choice(self, index: int, echo: str = "") -> WholeChoice:
        """The writer of one choice."""
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
                "id": shape.answer_id,
                "object": "chat.completion" if shape.is_chat else "text_completion",
                "created": shape.created,
                "model": shape.model,
                "choices": [choice.json() for choice in sorted(self._choices, key=lambda choice: choice.index)],
                "usage": shape.usage(sum(choice.output_tokens for choice in self._choices)),
            }
        )


class WholeChoice:
    """One choice of a `WholeAnswer`."""

    def __init__(self, answer: WholeAnswer, index: int, echo: str) -> None:
        self.index = index
        self.output_tokens = 0
        self._answer = answer
        self._parts: list[bytes] = [_json(echo)[1:-1]] if echo else []
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

    def fail(self, failure: Failure, output_tokens: int) -> None:
        """The whole answer fails."""
        self._answer.fail(failure)

    def json(self) -> dict[str, object]:
        """OpenAI's object for a choice."""
        content = msgspec.Raw(b'"' + b"".join(self._parts) + b'"')
        shape = self._answer.shape
        logprobs = shape.logprobs(self._logprobs) if self._logprobs else None
        end = {"logprobs": logprobs, "finish_reason": self._finish_reason}
        if shape.is_chat:
            return {"index": self.index, "message": {"role": "assistant", "content": content, "refusal": None}, **end}
        return {"index": self.index, "text": content, **end}
