"""Messages on the wire: the bytes of every version stay readable, and what is foreign is told apart from what is new."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hocket.bus import HandoffToken, RequestId, RouterId, WorkerId, block_hashes, block_hashes_of, chain_seed
from hocket.bus import messages as m
from hocket.bus.block_hash import ROOT_SEED

R, RID, W = RequestId("0" * 32), RouterId("r1"), WorkerId("w1")
TOKENS = b"\x01\x00\x00\x00\xff\xff\xff\x7f"
SAMPLING = m.SamplingParams(max_tokens=7, seed=3, logit_bias={5: -1.5}, logprobs=2, stop_token_ids=(2,))

GOLDEN: dict[str, tuple[m.Message | m.TokenFrame, str]] = {
    "worker_card": (
        m.WorkerCard(W, "decode", 2**62, "demo", "f1", 16, 100, 4, 2048, ("ucx://127.0.0.1:1",), "sim", 1, False),
        "8da474797065ab776f726b65725f63617264a9776f726b65725f6964a27731a4726f6c65a66465636f6465a565706f6368cf"
        "4000000000000000a56d6f64656ca464656d6fab66696e6765727072696e74a26631ac626c6f636b5f746f6b656e7310a96b"
        "765f626c6f636b7364a5736c6f747304ad6d61785f6d6f64656c5f6c656ecd0800b168616e646f66665f6164647265737365"
        "7391b17563783a2f2f3132372e302e302e313a31a6656e67696e65a373696db363616e5f70726566696c6c5f6c6f63616c6c"
        "79c2",
    ),
    "worker_card_short": (
        m.WorkerCard(W, "prefill", 1, "demo", "f1", 16, 0, 4, 0),
        "8aa474797065ab776f726b65725f63617264a9776f726b65725f6964a27731a4726f6c65a770726566696c6ca565706f6368"
        "01a56d6f64656ca464656d6fab66696e6765727072696e74a26631ac626c6f636b5f746f6b656e7310a96b765f626c6f636b"
        "7300a5736c6f747304ad6d61785f6d6f64656c5f6c656e00",
    ),
    "heartbeat": (
        m.Heartbeat(W, 1, "decode", 2, 3, 40, 5, True, 1234.5),
        "8aa474797065a9686561727462656174a9776f726b65725f6964a27731a565706f636801a4726f6c65a66465636f6465a772"
        "756e6e696e6702a777616974696e6703ae6b765f626c6f636b735f6672656528ac6b765f6576656e745f73657105ab69735f"
        "647261696e696e67c3b470726566696c6c5f746f6b656e735f7065725f73cb40934a0000000000",
    ),
    "heartbeat_of_an_engine_that_hangs": (
        m.Heartbeat(W, 1, "decode", 2, steps=700, due=2, is_stuck=True),
        "88a474797065a9686561727462656174a9776f726b65725f6964a27731a565706f636801a4726f6c65a66465636f6465a772"
        "756e6e696e6702a57374657073cd02bca364756502a869735f737475636bc3",
    ),
    "goodbye": (
        m.Goodbye(W, 1),
        "83a474797065a7676f6f64627965a9776f726b65725f6964a27731a565706f636801",
    ),
    "decode_job": (
        m.DecodeJob(R, 1, RID, 9, TOKENS, SAMPLING, "demo", 12.5, HandoffToken(b"t" * 16), "f1", 3),
        "8ca474797065aa6465636f64655f6a6f62aa726571756573745f6964d9203030303030303030303030303030303030303030"
        "303030303030303030303030a7617474656d707401a9726f757465725f6964a27231a973747265616d5f696409a9746f6b65"
        "6e5f696473c40801000000ffffff7fa873616d706c696e6785aa6d61785f746f6b656e7307a47365656403aa6c6f6769745f"
        "626961738105cbbff8000000000000a86c6f6770726f627302ae73746f705f746f6b656e5f6964739102a56d6f64656ca464"
        "656d6fab74696d655f6c6566745f73cb4029000000000000ad68616e646f66665f746f6b656ec41074747474747474747474"
        "747474747474ab66696e6765727072696e74a26631a565706f636803",
    ),
    "decode_job_local": (
        m.DecodeJob(R, 0, RID, 9, TOKENS, m.SamplingParams(), "demo", 12.5),
        "89a474797065aa6465636f64655f6a6f62aa726571756573745f6964d9203030303030303030303030303030303030303030"
        "303030303030303030303030a7617474656d707400a9726f757465725f6964a27231a973747265616d5f696409a9746f6b65"
        "6e5f696473c40801000000ffffff7fa873616d706c696e6780a56d6f64656ca464656d6fab74696d655f6c6566745f73cb40"
        "29000000000000",
    ),
    "admitted": (
        m.Admitted(R, 1),
        "83a474797065a861646d6974746564aa726571756573745f6964d92030303030303030303030303030303030303030303030"
        "30303030303030303030a7617474656d707401",
    ),
    "refused": (
        m.Refused(R, 1, "busy", "4 of 4 slots", 0.5),
        "86a474797065a772656675736564aa726571756573745f6964d9203030303030303030303030303030303030303030303030"
        "303030303030303030a7617474656d707401a6726561736f6ea462757379a664657461696cac34206f66203420736c6f7473"
        "ad72657472795f61667465725f73cb3fe0000000000000",
    ),
    "prefill_job": (
        m.PrefillJob(R, 1, RID, TOKENS, "demo", HandoffToken(b"t" * 16), W, 3, ("tcp://127.0.0.1:1",), "f1", 1.5e9),
        "8ca474797065ab70726566696c6c5f6a6f62aa726571756573745f6964d92030303030303030303030303030303030303030"
        "30303030303030303030303030a7617474656d707401a9726f757465725f6964a27231a9746f6b656e5f696473c408010000"
        "00ffffff7fa56d6f64656ca464656d6fad68616e646f66665f746f6b656ec41074747474747474747474747474747474ad64"
        "65636f64655f776f726b6572a27731ac6465636f64655f65706f636803b06465636f64655f61646472657373657391b17463"
        "703a2f2f3132372e302e302e313a31ab66696e6765727072696e74a26631af646561646c696e655f756e69785f73cb41d65a"
        "0bc0000000",
    ),
    "prefill_job_of_a_tenant": (
        m.PrefillJob(
            R,
            1,
            RID,
            TOKENS,
            "demo",
            HandoffToken(b"t" * 16),
            W,
            3,
            ("tcp://127.0.0.1:1",),
            "f1",
            1.5e9,
            tenant="acme",
            share=2.0,
            priority=1,
        ),
        "de000fa474797065ab70726566696c6c5f6a6f62aa726571756573745f6964d9203030303030303030303030303030303030"
        "303030303030303030303030303030a7617474656d707401a9726f757465725f6964a27231a9746f6b656e5f696473c40801"
        "000000ffffff7fa56d6f64656ca464656d6fad68616e646f66665f746f6b656ec41074747474747474747474747474747474"
        "ad6465636f64655f776f726b6572a27731ac6465636f64655f65706f636803b06465636f64655f61646472657373657391b1"
        "7463703a2f2f3132372e302e302e313a31ab66696e6765727072696e74a26631af646561646c696e655f756e69785f73cb41"
        "d65a0bc0000000a674656e616e74a461636d65a57368617265cb4000000000000000a87072696f7269747901",
    ),
    "prefill_job_with_clocks": (
        m.PrefillJob(
            R, 1, RID, TOKENS, "demo", HandoffToken(b"t" * 16), W, 3, (), "f1", 1.5e9, time_left_s=9.5, sent_s=77.5
        ),
        "de000ea474797065ab70726566696c6c5f6a6f62aa726571756573745f6964d9203030303030303030303030303030303030"
        "303030303030303030303030303030a7617474656d707401a9726f757465725f6964a27231a9746f6b656e5f696473c40801"
        "000000ffffff7fa56d6f64656ca464656d6fad68616e646f66665f746f6b656ec41074747474747474747474747474747474"
        "ad6465636f64655f776f726b6572a27731ac6465636f64655f65706f636803b06465636f64655f61646472657373657390ab"
        "66696e6765727072696e74a26631af646561646c696e655f756e69785f73cb41d65a0bc0000000ab74696d655f6c6566745f"
        "73cb4023000000000000a673656e745f73cb4053600000000000",
    ),
    "placed_load_with_clock": (
        m.PlacedLoad(RID, clock_s=77.5),
        "83a474797065ab706c616365645f6c6f6164a9726f757465725f6964a27231a7636c6f636b5f73cb4053600000000000",
    ),
    "prefill_returned": (
        m.PrefillReturned(R, 1, W),
        "84a474797065b070726566696c6c5f72657475726e6564aa726571756573745f6964d9203030303030303030303030303030"
        "303030303030303030303030303030303030a7617474656d707401a9776f726b65725f6964a27731",
    ),
    "placed_load": (
        m.PlacedLoad(RID, {W: (2, 30)}, {WorkerId(""): m.LaneLoad(3, 600, 1, "f1", 2)}, {"acme": (600, 30)}, True),
        "86a474797065ab706c616365645f6c6f6164a9726f757465725f6964a27231a66465636f646581a2773192021ea56c616e65"
        "7381a09503cd025801a2663102a774656e616e747381a461636d6592cd02581ea86861735f6c656674c3",
    ),
    "prefill_claimed": (
        m.PrefillClaimed(R, 1, 2, W, 3, "$JS.ACK.x"),
        "87a474797065af70726566696c6c5f636c61696d6564aa726571756573745f6964d920303030303030303030303030303030"
        "3030303030303030303030303030303030a7617474656d707401a864656c697665727902a9776f726b65725f6964a27731a5"
        "65706f636803ab61636b5f7375626a656374a9244a532e41434b2e78",
    ),
    "prefill_done": (
        m.PrefillDone(R, 1, 2, W, 100, 28, 65536),
        "88a474797065ac70726566696c6c5f646f6e65aa726571756573745f6964d920303030303030303030303030303030303030"
        "3030303030303030303030303030a7617474656d707401a864656c697665727902a9776f726b65725f6964a27731af636f6d"
        "70757465645f746f6b656e7364ad6361636865645f746f6b656e731ca86b765f6279746573ce00010000",
    ),
    "prefill_failed": (
        m.PrefillFailed(R, 1, "exhausted", "4 deliveries"),
        "85a474797065ae70726566696c6c5f6661696c6564aa726571756573745f6964d92030303030303030303030303030303030"
        "30303030303030303030303030303030a7617474656d707401a6726561736f6ea9657868617573746564a664657461696cac"
        "342064656c69766572696573",
    ),
    "cancel": (
        m.Cancel(R, 2),
        "83a474797065a663616e63656caa726571756573745f6964d920303030303030303030303030303030303030303030303030"
        "3030303030303030a7617474656d707402",
    ),
    "replay": (
        m.ReplayRequest(RID, R, 9, 1, 17),
        "86a474797065a67265706c6179a9726f757465725f6964a27231aa726571756573745f6964d9203030303030303030303030"
        "303030303030303030303030303030303030303030a973747265616d5f696409a7617474656d707401ab66697273745f696e"
        "64657811",
    ),
    "finish_ack": (
        m.FinishAck(RID, [(9, 1), (10, 0)]),
        "83a474797065aa66696e6973685f61636ba9726f757465725f6964a27231a866696e697368656492920901920a00",
    ),
    "ping": (
        m.Ping(),
        "81a474797065a470696e67",
    ),
    "unknown": (
        m.Unknown(R),
        "82a474797065a7756e6b6e6f776eaa726571756573745f6964d9203030303030303030303030303030303030303030303030"
        "303030303030303030",
    ),
    "kv_events": (
        m.KvEvents(
            W, 1, 5, [m.BlockStored([2**64 - 1, 1], 7), m.BlockStored([3]), m.BlockRemoved([1]), m.AllBlocksCleared()]
        ),
        "85a474797065a96b765f6576656e7473a9776f726b65725f6964a27731a565706f636801a373657105a66576656e74739483"
        "a474797065ac626c6f636b5f73746f726564a668617368657392cfffffffffffffffff01a6706172656e740782a474797065"
        "ac626c6f636b5f73746f726564a6686173686573910382a474797065ad626c6f636b5f72656d6f766564a668617368657391"
        "0181a474797065b2616c6c5f626c6f636b735f636c6561726564",
    ),
    "kv_snapshot_request": (
        m.KvSnapshotRequest(),
        "81a474797065b36b765f736e617073686f745f72657175657374",
    ),
    "kv_snapshot": (
        m.KvSnapshot(W, 1, 5, b"\x01" * 16, False),
        "86a474797065ab6b765f736e617073686f74a9776f726b65725f6964a27731a565706f636801a373657105a6686173686573"
        "c41001010101010101010101010101010101ab69735f636f6d706c657465c2",
    ),
    "describe_host": (m.DescribeHost(), "81a474797065ad64657363726962655f686f7374"),
    "host_report": (
        m.HostReport(
            W,
            1,
            m.HostFacts(
                "b",
                "ipc:[1]",
                "pid:[2]",
                1000,
                9.5,
                2**30,
                65536,
                1,
                {"eth0": 25000},
                ("mlx5_0",),
                2,
                "ucx,tcp",
                "ucxx-cu13 0.52.0",
                ("cma", "cuda"),
                {"UCX_TLS": "tcp"},
            ),
        ),
        "84a474797065ab686f73745f7265706f7274a9776f726b65725f6964a27731a565706f636801a566616374738fa7686f7374"
        "5f6964a162ad6970635f6e616d657370616365a76970633a5b315dad7069645f6e616d657370616365a77069643a5b325da7"
        "757365725f6964cd03e8ad636f70795f67625f7065725f73cb4023000000000000ae73686d5f667265655f6279746573ce40"
        "000000ad6d656d6c6f636b5f6279746573ce00010000ac7074726163655f73636f706501b26e6574776f726b5f6d6269745f"
        "7065725f7381a465746830cd61a8ac72646d615f6465766963657391a66d6c78355f30ac637564615f6465766963657302aa"
        "7472616e73706f727473a77563782c746370a475637878b0756378782d6375313320302e35322e30a97563785f7061727473"
        "92a3636d61a463756461a873657474696e677381a75543585f544c53a3746370",
    ),
    "probe_link": (
        m.ProbeLink(W, 3),
        "83a474797065aa70726f62655f6c696e6bad6465636f64655f776f726b6572a27731ac6465636f64655f65706f636803",
    ),
    "link_report": (
        m.LinkReport(
            W, 1, W, (m.RankLink(0, 1, "tcp://127.0.0.1:1", "tcp", False, "host", 1.5, 75.0, ((65536, 1.25),)),)
        ),
        "85a474797065ab6c696e6b5f7265706f7274a9776f726b65725f6964a27731a565706f636801ad6465636f64655f776f726b"
        "6572a27731a56c696e6b739189a966726f6d5f72616e6b00a7746f5f72616e6b01a761646472657373b17463703a2f2f3132"
        "372e302e302e313a31a97472616e73706f7274a3746370b36d6f7665735f6465766963655f6d656d6f7279c2a96b765f6d65"
        "6d6f7279a4686f7374a76469616c5f6d73cb3ff8000000000000ad726f756e645f747269705f7573cb4052c00000000000a5"
        "72617465739192ce00010000cb3ff4000000000000",
    ),
    "link_report_failure": (
        m.LinkReport(W, 1, W, (), "busy", "later"),
        "86a474797065ab6c696e6b5f7265706f7274a9776f726b65725f6964a27731a565706f636801ad6465636f64655f776f726b"
        "6572a27731a76661696c757265a462757379a664657461696ca56c61746572",
    ),
    "token_frame": (
        m.TokenFrame(W, 1, [(9, 1, 17, [5, 100_000], m.FINISH_NONE), (10, 0, 3, [], m.FINISH_STOP)]),
        "94a277310192950901119205ce000186a000950a0003900180",
    ),
    "token_frame_details": (
        m.TokenFrame(
            W,
            1,
            [(9, 1, 0, [5], 0)],
            {0: m.EntryDetail((m.TokenLogprob(-0.5, ((5, -0.5), (6, -1.5))),), "", "", 2, 100, 28)},
        ),
        "94a27731019195090100910500810084a86c6f6770726f62739192cbbfe0000000000000929205cbbfe00000000000009206"
        "cbbff8000000000000aa73746f705f746f6b656e02af636f6d70757465645f746f6b656e7364ad6361636865645f746f6b65"
        "6e731c",
    ),
    "token_frame_error": (
        m.TokenFrame(
            W, 1, [(9, 1, 4, [], m.FINISH_ERROR)], {0: m.EntryDetail(error_code="engine_error", error="it broke")}
        ),
        "94a277310191950901049003810082aa6572726f725f636f6465ac656e67696e655f6572726f72a56572726f72a869742062726f6b65",
    ),
}
"""Bytes as version 1 wrote them, in hex. Never change one; add a message or a field as a new line."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_every_version_are_still_read(name: str) -> None:
    message, golden = GOLDEN[name]
    decoded = (
        m.decode_frame(bytes.fromhex(golden)) if isinstance(message, m.TokenFrame) else m.decode(bytes.fromhex(golden))
    )
    assert decoded == message


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_written_now_is_read_the_same(name: str) -> None:
    message, _ = GOLDEN[name]
    decoded = m.decode_frame(m.encode(message)) if isinstance(message, m.TokenFrame) else m.decode(m.encode(message))
    assert decoded == message


def test_every_message_has_its_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN.values()} == {*get_args(m.Message), m.TokenFrame}


def test_a_field_of_a_newer_version_is_ignored() -> None:
    newer = msgspec.msgpack.encode({"type": "cancel", "request_id": R, "attempt": 2, "reason_of_1_1": {"a": [1]}})
    assert m.decode(newer) == m.Cancel(R, 2)


def test_an_unknown_tag_raises() -> None:
    with pytest.raises(msgspec.ValidationError, match="not_ours"):
        m.decode(msgspec.msgpack.encode({"type": "not_ours"}))


@pytest.mark.parametrize("payload", [b"", b"\x00", b"hello", b"\xc1", m.encode(m.TokenFrame(W, 1, []))])
def test_what_is_no_message_raises(payload: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        m.decode(payload)


@pytest.mark.parametrize("field", [{"attempt": "2"}, {"attempt": None}, {}])
def test_a_field_that_is_wrong_or_missing_raises(field: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        m.decode(msgspec.msgpack.encode({"type": "cancel", "request_id": R, **field}))


# ---- packed tokens and block hashes

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=200)


@given(token_lists)
def test_tokens_are_little_endian_int32_and_come_back(token_ids: list[int]) -> None:
    packed = m.pack_tokens(token_ids)
    assert packed == b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
    assert m.unpack_tokens(packed) == token_ids


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_cut_token_raises(length: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        m.unpack_tokens(b"\x00" * length)


@given(token_lists, st.integers(1, 33))
def test_a_chain_has_one_hash_for_each_whole_block(token_ids: list[int], block_tokens: int) -> None:
    hashes = block_hashes_of(token_ids, block_tokens)
    assert len(hashes) == len(token_ids) // block_tokens
    assert all(0 <= value < 2**64 for value in hashes)
    assert hashes == block_hashes(m.pack_tokens(token_ids), block_tokens)


@given(token_lists, st.integers(1, 17), st.integers(0, 10))
def test_a_chain_goes_on_from_any_of_its_hashes(token_ids: list[int], block_tokens: int, cut: int) -> None:
    whole = block_hashes_of(token_ids, block_tokens)
    head = block_hashes_of(token_ids[: cut * block_tokens], block_tokens)
    tail = block_hashes_of(token_ids[cut * block_tokens :], block_tokens, parent=head[-1] if head else None)
    assert head + tail == whole


@given(token_lists.filter(bool), st.data())
def test_a_changed_token_changes_every_hash_from_its_block_on(token_ids: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(token_ids) - 1))
    block_tokens = data.draw(st.integers(1, 8))
    other = list(token_ids)
    other[place] ^= 1
    before, after = block_hashes_of(token_ids, block_tokens), block_hashes_of(other, block_tokens)
    same = place // block_tokens
    assert before[:same] == after[:same]
    assert all(one != two for one, two in zip(before[same:], after[same:], strict=True))


def test_chains_of_different_salts_share_nothing() -> None:
    seeds = [chain_seed(*salts) for salts in ((), ("a",), ("b",), ("a", ""), ("", "a"), ("a", "b"), ("ab",))]
    assert seeds[0] == chain_seed("", "") == ROOT_SEED
    assert len(set(seeds)) == len(seeds)


def test_block_hashes_never_change_between_versions() -> None:
    assert block_hashes_of(range(8), 4) == [17934202597762919560, 2037005852074261496]
    assert chain_seed("tenant", "lora") == 17606668421778172833
