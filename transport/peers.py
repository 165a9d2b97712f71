"""The links of one endpoint: who is connected, who has said hello, one dialled link for each address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from . import frames
from .base import Link, Listener, Transport
from .errors import LinkLost, TransportError
from .handoff import LinkId
from .layout import HANDOFF_PROTOCOL
from .registry import start_transports

log = logging.getLogger(__name__)
DIAL_TIMEOUT_S = 2.0
HELLO_TIMEOUT_S = 2.0


class PeersOwner(Protocol):
    """Who is told what happens on links."""

    def on_greeted(self, link_id: LinkId, hello: frames.Hello) -> None:
        """Before the first frame. Raises ValueError when nothing can be done with this peer."""

    def on_frame(self, link_id: LinkId, frame: frames.Frame) -> None: ...

    def on_lost(self, link_id: LinkId, link: Link) -> None:
        """After every `done` of the link's messages."""


@dataclass(slots=True)
class _Peer:
    link: Link
    address: str | None  # as dialled; None: it connected to us
    greeted: asyncio.Future[None]  # cancelled when it is lost before its hello
    has_greeted: bool = False
    bytes_seen: int = 0
    is_aborting: bool = False


class Peers:
    """The transports belong to it, which starts and closes them. All calls on one loop."""

    def __init__(self, transports: Sequence[Transport], hello: frames.Hello, owner: PeersOwner) -> None:
        self.offered = list(transports)  # also those that will not run here
        self._transports: list[Transport] = []
        self._hello = frames.encode(hello)
        self._owner = owner
        self._peers: dict[LinkId, _Peer] = {}
        self._dialled: dict[str, LinkId] = {}
        self._dials: dict[str, asyncio.Task[LinkId]] = {}
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_link = 0
        self._is_closed = False
        self.lost = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(listener.address for listener in self._listeners)

    @property
    def transports(self) -> dict[str, str]:
        """Peer -> what moves the bytes."""
        return {peer.link.peer: peer.link.transport for peer in self._peers.values()}

    async def start(self, bind_host: str | None) -> None:
        """Listen there; None: not at all. Raises TransportUnavailable when none of the transports runs here."""
        self._loop = asyncio.get_running_loop()
        self._transports = await start_transports(self.offered)
        if bind_host is not None:
            for transport in self._transports:
                self._listeners.append(await transport.listen(bind_host, self._accept))

    async def stop_dialling(self) -> None:
        """Take and make no more links."""
        self._is_closed = True
        for listener in self._listeners:
            await listener.aclose()
        dials = [*self._dials.values(), *(task for task in self._tasks if task.get_name() == "dial")]
        for task in dials:
            task.cancel()
        if dials:
            await asyncio.wait(dials)

    async def aclose(self) -> None:
        """Abort every link; what is due is told before this returns."""
        for link_id in list(self._peers):
            self.abort(link_id, "closing")
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close_transports(self) -> None:
        for transport in self._transports:
            await transport.aclose()

    def link(self, link_id: LinkId) -> Link | None:
        """None when it is gone or going."""
        peer = self._peers.get(link_id)
        return None if peer is None or peer.is_aborting else peer.link

    def has_link(self, addresses: Sequence[str]) -> bool:
        """Whether `dial_any` would find one that is there."""
        return any(address in self._dialled for address in addresses)

    def say(self, link_id: LinkId, frame: frames.Frame) -> None:
        """Nothing happens on a link that is gone: its owner is told so anyway."""
        if link := self.link(link_id):
            try:
                link.send_control(frames.encode(frame))
            except LinkLost:
                log.debug("frame to %s after its link was lost", link.peer)

    def abort(self, link_id: LinkId, why: str) -> None:
        """Drop a link now; `on_lost` follows."""
        peer = self._peers.get(link_id)
        if peer is None or peer.is_aborting:
            return
        peer.is_aborting = True
        self._forget_address(link_id, peer)  # The next order makes a new one.
        log.log(logging.DEBUG if why == "closing" else logging.WARNING, "aborted %s: %s", peer.link.peer, why)
        self.own(peer.link.abort(), "abort")

    def own(self, work: Coroutine[None, None, None], name: str) -> None:
        """Run it as a task that `aclose` waits for; one named "dial" is cancelled then."""
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def active(self) -> list[LinkId]:
        """The links on which bytes came since the last call."""
        active = []
        for link_id, peer in list(self._peers.items()):
            received = peer.link.bytes_received
            if received != peer.bytes_seen:
                peer.bytes_seen = received
                active.append(link_id)
        return active

    async def dial_any(self, addresses: Sequence[str]) -> LinkId:
        """A link to the first address that answers, greeted. Raises LinkLost with everybody's reason."""
        failures: list[str] = []
        for address in addresses:
            try:
                link_id = await self._connect(address)
            except (TransportError, ValueError) as error:
                failures.append(str(error))
                if len(failures) < len(addresses):
                    log.warning("trying the next way to a decode worker: %s", error)
                continue
            if peer := self._peers.get(link_id):
                await asyncio.wait({peer.greeted})
                if not peer.greeted.cancelled() and self.link(link_id):
                    return link_id
            failures.append(f"lost {address} at once")
        raise LinkLost("; ".join(failures))

    async def _connect(self, address: str) -> LinkId:
        """The one link to this address, made when there is none. Raises LinkLost, ValueError."""
        if (link_id := self._dialled.get(address)) is not None:
            return link_id
        dial = self._dials.get(address)
        if dial is None:
            dial = self._dials[address] = self._loop.create_task(self._dial(address), name=f"dial {address}")
            dial.add_done_callback(lambda _: self._dials.pop(address))
        return await asyncio.shield(dial)

    async def _dial(self, address: str) -> LinkId:
        scheme = address.partition("://")[0]
        for transport in self._transports:
            if transport.scheme == scheme:
                link = await transport.connect(address, timeout_s=DIAL_TIMEOUT_S)
                return self._adopt(link, address)
        running = ", ".join(transport.scheme for transport in self._transports)
        raise LinkLost(f"no transport for {address!r}; running: {running}")

    def _accept(self, link: Link) -> None:
        self._adopt(link, address=None)

    def _adopt(self, link: Link, address: str | None) -> LinkId:
        self._last_link += 1
        link_id = LinkId(self._last_link)
        peer = _Peer(link, address, self._loop.create_future())
        self._peers[link_id] = peer
        if address is not None:
            self._dialled[address] = link_id

        def on_control(payload: bytes) -> None:
            self._on_control(link_id, peer, payload)

        def on_lost(error: Exception) -> None:
            self._on_lost(link_id, peer, error)

        link.start(on_control, on_lost)
        if self._is_closed:
            self.abort(link_id, "closing")
            return link_id
        try:
            link.send_control(self._hello)
        except LinkLost:
            log.debug("lost %s before the hello", link.peer)
        self._loop.call_later(HELLO_TIMEOUT_S, self._expect_hello, link_id)
        return link_id

    def _expect_hello(self, link_id: LinkId) -> None:
        peer = self._peers.get(link_id)
        if peer and not peer.has_greeted:
            self.abort(link_id, "said no hello")

    def _on_control(self, link_id: LinkId, peer: _Peer, payload: bytes) -> None:
        if peer.is_aborting:
            return
        try:
            frame = frames.decode(payload)
        except frames.BadFrame as error:
            self.abort(link_id, str(error))
            return
        if peer.has_greeted:
            self._owner.on_frame(link_id, frame)
        else:
            self._greet(link_id, peer, frame)

    def _greet(self, link_id: LinkId, peer: _Peer, frame: frames.Frame) -> None:
        if not isinstance(frame, frames.Hello) or frame.protocol != HANDOFF_PROTOCOL:
            self.abort(link_id, f"no hello of protocol {HANDOFF_PROTOCOL}")
            return
        try:
            self._owner.on_greeted(link_id, frame)
        except ValueError as error:
            self.abort(link_id, str(error))
            return
        peer.has_greeted = True
        peer.greeted.set_result(None)
        log.info("linked to %s at %s over %s", frame.worker, peer.link.peer, peer.link.transport)

    def _on_lost(self, link_id: LinkId, peer: _Peer, error: Exception) -> None:
        peer.greeted.cancel()
        del self._peers[link_id]
        self._forget_address(link_id, peer)
        if not self._is_closed:
            self.lost += 1
            log.info("lost %s: %s", peer.link.peer, error)
        self._owner.on_lost(link_id, peer.link)

    def _forget_address(self, link_id: LinkId, peer: _Peer) -> None:
        if peer.address is not None and self._dialled.get(peer.address) == link_id:
            del self._dialled[peer.address]
