"""What the ranks of one engine report is joined: whole when all are, failed when one is, told to the others once."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from hocket.transport.base import HandoffKey
from hocket.transport.layout import KvLayer, KvLayout, KvShape
from hocket.workers.engines.vllm.kv_tensors import UnfitKv
from hocket.workers.engines.vllm.rank_joins import RankJoins
from hocket.workers.engines.vllm.side_channel import RankFailed, Ready, ReceiveEnded, SendEnded

RANKS = 3
KEY = HandoffKey(b"t" * 16, 1, 1)
LAYOUT = KvLayout("model", "1", "float32", "float32", (KvLayer("a", 6, 64),), KvShape((16,)))


def ready(rank: int, **changes: object) -> Ready:
    layout = msgspec.structs.replace(LAYOUT, shape=KvShape((16,), tp_size=RANKS, tp_rank=rank))
    return msgspec.structs.replace(Ready((f"ucx://{rank}", f"tcp://{rank}"), layout, 100 + rank), **changes)


def sent(kv_bytes: int, reason: str = "") -> SendEnded:
    return SendEnded(KEY, not reason, kv_bytes, reason)


def received(valid_token: int, reason: str = "") -> ReceiveEnded:
    return ReceiveEnded(KEY.token, not reason, 32, valid_token, 10, reason)


@pytest.fixture
def joins() -> RankJoins:
    made = RankJoins()
    for rank in range(RANKS):
        made.ready(ready(rank))
    return made


def test_the_engine_is_ready_with_its_last_rank_and_has_their_addresses_in_turn() -> None:
    joins = RankJoins()
    assert joins.ready(ready(2)) is None
    assert joins.ready(ready(0)) is None
    whole = joins.ready(ready(1))
    assert whole is not None
    assert whole.addresses == ("ucx://0", "tcp://0", "ucx://1", "tcp://1", "ucx://2", "tcp://2")
    assert (whole.layout.shape.tp_rank, whole.blocks) == (0, 100)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"addresses": ("tcp://1",)}, "do not listen in the same ways"),
        ({"layout": msgspec.structs.replace(ready(1).layout, kv_dtype="float16")}, "lay their KV out differently"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(changes: dict[str, object], why: str) -> None:
    joins = RankJoins()
    joins.ready(ready(0))
    joins.ready(ready(2))
    with pytest.raises(UnfitKv, match=why):
        joins.ready(ready(1, **changes))


def test_a_hand_off_has_landed_when_it_has_in_every_rank(joins: RankJoins) -> None:
    for _ in range(2):  # A key may come again.
        assert joins.ended(sent(5)) == (None, None)
        assert joins.ended(sent(6)) == (None, None)
        assert joins.ended(sent(7)) == (sent(18), None)


@pytest.mark.parametrize("order", list(itertools.permutations(range(RANKS))))
def test_one_rank_that_fails_fails_all_and_the_others_hear_it_once(joins: RankJoins, order: tuple[int, ...]) -> None:
    ends = [received(96), received(64, "digest"), received(48, "cancelled")]
    told, whole = [], []
    for index in order:
        end, failed = joins.ended(ends[index])
        whole += [end] if end else []
        told += [failed] if failed else []
    first = next(ends[index].reason for index in order if ends[index].reason)
    assert whole == [ReceiveEnded(KEY.token, False, 32, 48, 30, first)]
    assert told == [RankFailed(KEY.token, first)]


def test_one_rank_is_its_engine() -> None:
    joins = RankJoins()
    alone = Ready(("tcp://1",), LAYOUT, 7)
    assert joins.ready(alone) == alone
    assert joins.ended(sent(5, "timeout")) == (sent(5, "timeout"), None)
