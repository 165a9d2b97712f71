"""What links have in common whose control frames take a stream and whose KV is read out of the peer's memory by ourselves."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from ..base import ControlHandler, LostHandler
from ..errors import LinkLost
from ..frames import FRAME_BYTES_MAX
from .tcp import TcpLink

CLOSE_S = 1.0
EARLY_MAX = 1 << 12  # offers without a receive; an honest peer announces its messages first
CONTROL = 1  # the kind, a frame's first byte, of a control frame of the link's user


class ChannelLink(ABC):
    """One connected stream. A link is over when nothing of ours reads the peer's memory any more."""

    def __init__(self, channel: TcpLink) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._error: LinkLost | None = None
        self._is_over = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._on_control: ControlHandler | None = None
        self._on_lost: LostHandler | None = None

    @property
    @abstractmethod
    def _is_sending(self) -> bool:
        """The peer has yet to say that it has read something."""

    @property
    @abstractmethod
    def _is_reading(self) -> bool: ...

    @abstractmethod
    def _on_frame(self, kind: int, frame: bytes) -> bool:
        """What the peer says, but control frames; False: nonsense."""

    @abstractmethod
    def _let_go(self, error: LinkLost) -> None:
        """End at once what nothing reads."""

    @abstractmethod
    def _end(self) -> None:
        """The link is over."""

    @property
    def peer(self) -> str:
        return self._channel.peer

    def send_control(self, payload: bytes) -> None:
        if len(payload) > FRAME_BYTES_MAX:
            raise ValueError(f"control frame of {len(payload)} B; at most {FRAME_BYTES_MAX}")
        self._check_alive()
        self._channel.send_control(bytes([CONTROL]) + payload)

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        if self._error:
            self._loop.call_soon(on_lost, self._error)
        else:
            self._channel.start(self._on_payload, self._on_channel_lost)

    async def abort(self) -> None:
        """Returns when nothing of ours reads the peer's memory any more."""
        self._lose(LinkLost(f"{self.peer} was aborted here"))
        await self._is_over.wait()

    async def aclose(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._is_sending and self._error is None:
                    self._is_idle.clear()
                    await self._is_idle.wait()
        except TimeoutError:
            pass
        await self._channel.aclose()
        await self.abort()

    def _check_alive(self) -> None:
        if self._error:
            raise LinkLost(f"{self.peer} is gone") from self._error

    def _on_payload(self, frame: bytes) -> None:
        assert self._on_control
        kind = frame[0]
        if kind == CONTROL:
            self._on_control(frame[1:])
        elif not self._on_frame(kind, frame):
            self._lose(LinkLost(f"{self.peer} sent a frame of kind {kind} and {len(frame)} B"))

    def _on_channel_lost(self, error: Exception) -> None:
        self._lose(error if isinstance(error, LinkLost) else LinkLost(str(error)))

    def _lose(self, error: LinkLost) -> None:
        if self._error is None:
            self._error = error
            self._channel.drop(error)
            self._let_go(error)
            self._check_over()

    def _check_over(self) -> None:
        self._is_idle.set()
        if self._error is None or self._is_reading or self._is_over.is_set():
            return
        self._is_over.set()
        self._end()
        if self._on_lost:
            self._on_lost(self._error)
