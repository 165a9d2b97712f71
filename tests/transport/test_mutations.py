"""The world of `test_interleavings` notices when a part of the protocol is taken out, each within 1,000 seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from handoff_parts import Job, Request
from handoff_world import EPOCH, World
from msgspec.structs import replace as replace_frame

from hocket.transport import frames
from hocket.transport.base import SendEnd, SendReleased
from hocket.transport.handoff import AbortLink, LinkId, MessageDone, MessageId
from hocket.transport.receiver import Receiver
from hocket.transport.reception import Claim, Reception
from hocket.transport.sender import Sender, _Order

SEEDS_MAX = 1000


class ForgivingReceiver(Receiver):
    """What comes for a grant that is over is ignored, where the real one stops the process: that is the world's to find."""

    def _on_message(self, event: MessageDone, now: float) -> None:
        if self._is_granted(event.message):
            super()._on_message(event, now)

    def _on_digest(self, message: MessageId, digest: int, now: float) -> None:
        if self._is_granted(message):
            super()._on_digest(message, digest, now)

    def _is_granted(self, message: MessageId) -> bool:
        reception = self._receptions.get(message.key.token)
        return bool(reception and reception.grant and reception.grant.transfer == message.transfer)


class WithoutEpoch(Receiver):
    """Grants what was meant for an earlier incarnation of the worker."""

    def _on_claim(self, link: LinkId, frame: frames.Claim, now: float) -> None:
        super()._on_claim(link, replace_frame(frame, decode_epoch=self._epoch), now)


class WithoutOrder(Receiver):
    """Grants whoever claims last, also an older attempt."""

    def _offer(self, reception: Reception, claim: Claim, now: float) -> None:
        reception.newest = (0, 0)
        reception.expectation = replace(reception.expectation, attempt=0)
        super()._offer(reception, claim, now)


class WithoutStopping(ForgivingReceiver):
    """Grants a newer claim at once, while the older writer may still write."""

    def _offer(self, reception: Reception, claim: Claim, now: float) -> None:
        if reception.grant:
            self._release(reception, reception.grant, now)
        super()._offer(reception, claim, now)

    def _on_lost(self, link: LinkId, now: float) -> None:
        for reception in self._receptions.values():
            if reception.grant and reception.grant.link == link:
                reception.grant.posted = 0
        super()._on_lost(link, now)


class WithoutDigests(Receiver):
    """Believes that what arrived is what was sent."""

    def _settle(self, reception: Reception, now: float) -> None:
        for chunk in reception.grant.chunks if reception.grant else ():
            if chunk.sent is not None:
                chunk.here = {number: chunk.sent[number] for number in chunk.here}
        super()._settle(reception, now)


class WithoutQuarantine(ForgivingReceiver):
    """Gives the blocks back as soon as it is told to, while receives are posted."""

    def _finish(self, reception: Reception, reason: str, now: float) -> None:
        super()._finish(reception, reason, now)
        if reception.grant and reception.expectation.token in self._receptions:
            self._release(reception, reception.grant, now)
            self._end(reception, is_landed=False, reason=reason)


class WithoutAwaitingTheAbort(ForgivingReceiver):
    """Gives the blocks back when it has told the link to abort, not when the abort has completed."""

    def _on_tick(self, now: float) -> None:
        super()._on_tick(now)
        aborted = [instruction.link for instruction in self._out if isinstance(instruction, AbortLink)]
        for reception in list(self._receptions.values()):
            if reception.grant and reception.grant.link in aborted:
                self._release(reception, reception.grant, now)
                self._end(reception, is_landed=False, reason=reception.ending or "stalled")


class WithoutHolding(Sender):
    """Gives the source blocks back while sends and digests read them."""

    def _settle(self, order: _Order, now: float) -> None:
        if order.ending is not None:
            order.reading = 0
        super()._settle(order, now)

    def _on_read(self, message: MessageId, now: float, error: BaseException | None) -> None:
        if message.key in self._orders:
            super()._on_read(message, now, error)

    def _on_digest(self, message: MessageId, digest: int, now: float) -> None:
        if message.key in self._orders:
            super()._on_digest(message, digest, now)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A thousand broken worlds have much to warn of."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def first_failure(
    receiver: type[Receiver] = Receiver, sender: type[Sender] = Sender, *, has_rules: bool = True
) -> tuple[int, str]:
    """The first seed that notices, and what its world says; without rules only bytes can show it."""

    class MutatedWorld(World):
        def make_receiver(self) -> Receiver:
            return receiver(self.layout, epoch=EPOCH)

        def make_sender(self) -> Sender:
            return sender(layers=len(self.layout.layers))

        def receives_of(self, request: Request) -> list[MessageId]:
            return super().receives_of(request) if has_rules else []

        def check_sent(self, job: Job, event: SendReleased | SendEnd) -> None:
            job.reading *= has_rules
            super().check_sent(job, event)

    for seed in range(SEEDS_MAX):
        try:
            MutatedWorld(seed).run()
        except AssertionError as error:
            return seed, str(error)
    raise AssertionError(f"{SEEDS_MAX} worlds did not notice")


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        (WithoutEpoch, "a job for an earlier incarnation was granted"),
        (WithoutOrder, "an older attempt was granted"),
        (WithoutStopping, "a second writer was granted beside the first"),
        (WithoutDigests, "a good block is wrong"),
        (WithoutQuarantine, "blocks were given back while a receive was posted"),
        (WithoutAwaitingTheAbort, "blocks were given back while a receive was posted"),
    ],
)
def test_a_receiver_without_it_is_found_out(receiver: type[Receiver], said: str) -> None:
    seed, found = first_failure(receiver)
    assert said in found, (seed, found)


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        (WithoutStopping, "somebody wrote whose grant was over"),
        (WithoutQuarantine, "a block was written after its expectation had ended"),
        (WithoutAwaitingTheAbort, "a block was written after its expectation had ended"),
    ],
)
def test_its_late_writes_show_where_no_rule_is_checked(receiver: type[Receiver], said: str) -> None:
    seed, found = first_failure(receiver, has_rules=False)
    assert said in found, (seed, found)


def test_a_sender_that_does_not_hold_its_blocks_is_found_out() -> None:
    seed, found = first_failure(sender=WithoutHolding)
    assert "source blocks were given back while something read them" in found, (seed, found)
    seed, found = first_failure(sender=WithoutHolding, has_rules=False)
    assert "a source block was read after its release" in found, (seed, found)


def test_the_same_worlds_find_nothing_wrong_with_the_real_ones() -> None:
    with pytest.raises(AssertionError, match="did not notice"):
        first_failure()
