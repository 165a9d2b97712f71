"""What is stored and what crosses the bus between routers and operators: the bytes of every version stay readable."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from hocket.bus.ids import RequestId, RouterId, WorkerId
from hocket.bus.messages import LaneLoad
from hocket.router import control_messages as m

R, RID, W = RequestId("0" * 32), RouterId("r1"), WorkerId("w1")
CONFIG = m.PolicyConfig("kv?temperature=0.5", m.Canary("cost", 0.25), ("round_robin",), 2.0, 3, 30.0)
RECEIPT = m.Receipt(
    R, RID, "demo", 64, 16, 1.5e9,
    [
        m.AttemptReceipt(
            0.5, W, "remote", "kv", "canary", 4, "why", "failure", 41.5, 0.25, WorkerId("p1"),
            [m.CandidateReceipt(W, 32, 3, 8, 1, 80, 100, "exact", 0.25, {"queue": 1.5})],
            [m.PrefillReceipt(WorkerId("p1"), 16, 1, 2, 4)],
            {WorkerId("w2"): "draining"},
            [m.ShadowReceipt("cost", W, "local", "cheap", 0.5, 12.0)],
        )
    ],
    m.OutcomeReceipt("finished", 1.5, "", 16, 0.25, 0.01, 32, 16, WorkerId("p1")),
)  # fmt: skip
FIGURES = m.Distribution(2, 0.75, {-20: 1, -5: 1})

GOLDEN: dict[str, tuple[m.Question | m.Answer, str]] = {
    "ask_policies": (m.AskPolicies(True),
        "82a474797065ac61736b5f706f6c6963696573a57265616473c3"),
    "try_policies": (m.TryPolicies(CONFIG),
        "82a474797065ac7472795f706f6c6963696573a6636f6e66696786a77072696d617279b26b763f74656d7065726174757265"
        "3d302e35a663616e61727982a6706f6c696379a4636f7374a57368617265cb3fd0000000000000a7736861646f777391ab72"
        "6f756e645f726f62696eae7069636b5f6275646765745f6d73cb4000000000000000ac6661696c757265735f6d617803a877"
        "696e646f775f73cb403e000000000000"),
    "ask_receipt": (m.AskReceipt(R),
        "82a474797065ab61736b5f72656365697074aa726571756573745f6964d92030303030303030303030303030303030303030"
        "30303030303030303030303030"),
    "ask_load": (m.AskLoad(),
        "81a474797065a861736b5f6c6f6164"),
    "policies_tried": (m.PoliciesTried(RID, "no"),
        "83a474797065ae706f6c69636965735f7472696564a9726f757465725f6964a27231a770726f626c656da26e6f"),
    "policy_status": (
        m.PolicyStatus(
            RID, 4, CONFIG, [m.ArmStatus("primary", "kv", "slow", 9, ttft_s=FIGURES)], [m.ShadowStatus("cost", seen=9)],
            12.5, "none", {"a.py:A": "ff"},
        ),

        "89a474797065ad706f6c6963795f737461747573a9726f757465725f6964a27231a776657273696f6e04a6636f6e66696786"
        "a77072696d617279b26b763f74656d70657261747572653d302e35a663616e61727982a6706f6c696379a4636f7374a57368"
        "617265cb3fd0000000000000a7736861646f777391ab726f756e645f726f62696eae7069636b5f6275646765745f6d73cb40"
        "00000000000000ac6661696c757265735f6d617803a877696e646f775f73cb403e000000000000a461726d7391de0010a361"
        "726da77072696d617279a6706f6c696379a26b76a87265706c61636564a4736c6f77a57069636b7309a672616973656400a8"
        "6f76657272756e7300aa6c6173745f6572726f72a0a8726571756573747300a66572726f727300ad70726f6d70745f746f6b"
        "656e7300ad6361636865645f746f6b656e7300b06361636865645f6f665f746f6b656e7300a67069636b5f739300cb000000"
        "000000000080a6747466745f739302cb3fe800000000000082ec01fb01a569746c5f739300cb000000000000000080b07072"
        "6564696374696f6e5f6572726f729300cb000000000000000080a7736861646f7773918fa6706f6c696379a4636f7374a773"
        "746f70706564a0a47365656e09a673636f72656400ab73616d655f776f726b657200a973616d655f706c616e00a672616973"
        "656400a86f76657272756e7300aa6c6173745f6572726f72a0aa747466745f706169727300ab747466745f6761696e5f73cb"
        "0000000000000000aa636f73745f706169727300ab636f73745f657863657373cb0000000000000000a67069636b5f739300"
        "cb000000000000000080b070726564696374696f6e5f6572726f729300cb000000000000000080a773696e63655f73cb4029"
        "000000000000a770726f626c656da46e6f6e65a7736f757263657381a6612e70793a41a26666",
    ),
    "router_load": (
        m.RouterLoad(
            RID, 7, {W: LaneLoad(2, 900, 1, "f", 2)},
            {W: m.WorkerLoad("decode", "approximate", 0.25, True, 3, 0.5, 64, 32, 9)},
        ),
        "85a474797065ab726f757465725f6c6f6164a9726f757465725f6964a27231a9696e5f666c6967687407a56c616e657381a2"
        "77319502cd038401a16602a7776f726b65727381a2773189a4726f6c65a66465636f6465a5696e646578ab617070726f7869"
        "6d617465a768656172645f73cb3fd0000000000000aa69735f73757370656374c3a773747265616d7303a56472696674cb3f"
        "e0000000000000ad70726f6d70745f746f6b656e7340ad6361636865645f746f6b656e7320a86b765f627974657309",
    ),
    "receipt": (m.ReceiptAnswer(RID, RECEIPT, 7, 3.5),
        "85a474797065a772656365697074a9726f757465725f6964a27231a77265636569707488aa726571756573745f6964d92030"
        "30303030303030303030303030303030303030303030303030303030303030a9726f757465725f6964a27231a56d6f64656c"
        "a464656d6fad70726f6d70745f746f6b656e7340aa6d61785f746f6b656e7310ae737461727465645f756e69785f73cb41d6"
        "5a0bc0000000a8617474656d707473918fa761667465725f73cb3fe0000000000000a6776f726b6572a27731a4706c616ea6"
        "72656d6f7465a6706f6c696379a26b76a361726da663616e617279a776657273696f6e04a3776879a3776879a76661696c75"
        "7265a76661696c757265a77069636b5f7573cb4044c00000000000b07072656469637465645f747466745f73cb3fd0000000"
        "000000a46c616e65a27031aa63616e64696461746573918aa6776f726b6572a27731aa6869745f746f6b656e7320a46c6f61"
        "6403a5736c6f747308a9696e5f666c6967687401ae6b765f626c6f636b735f6672656550a96b765f626c6f636b7364a5696e"
        "646578a56578616374af6865617274626561745f6167655f73cb3fd0000000000000a5636f73747381a57175657565cb3ff8"
        "000000000000a770726566696c6c9185a6776f726b6572a27031aa6869745f746f6b656e7310a772756e6e696e6701a77761"
        "6974696e6702a5736c6f747304a866696c746572656481a27732a8647261696e696e67a7736861646f77739186a6706f6c69"
        "6379a4636f7374a6776f726b6572a27731a4706c616ea56c6f63616ca3776879a56368656170b07072656469637465645f74"
        "7466745f73cb3fe0000000000000a77069636b5f7573cb4028000000000000a76f7574636f6d6588a3656e64a866696e6973"
        "686564aa6475726174696f6e5f73cb3ff8000000000000ad6f75747075745f746f6b656e7310a6747466745f73cb3fd00000"
        "00000000a569746c5f73cb3f847ae147ae147bb47072656469637465645f6869745f746f6b656e7320ad6361636865645f74"
        "6f6b656e7310ae70726566696c6c5f776f726b6572a27031a468656c6407a86f6c646573745f73cb400c000000000000"),
}  # fmt: skip
DOCUMENT = (
    b'{"version":4,"config":{"primary":"kv?temperature=0.5","canary":{"policy":"cost","share":0.25},'
    b'"shadows":["round_robin"],"pick_budget_ms":2.0,"failures_max":3,"window_s":30.0},"set_unix_s":1.5e9,'
    b'"history":[{"primary":"kv"}]}'
)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_this_version_stay_readable(name: str) -> None:
    message, packed = GOLDEN[name]
    decode = m.decode_question if isinstance(message, m.Question) else m.decode_answer
    assert decode(bytes.fromhex(packed)) == message


def test_every_message_has_its_bytes_here() -> None:
    assert {type(message) for message, _ in GOLDEN.values()} == {*get_args(m.Question), *get_args(m.Answer)}


def test_a_stored_document_stays_readable() -> None:
    document = m.PolicyDocument(4, CONFIG, 1.5e9, (m.PolicyConfig("kv"),))
    assert msgspec.json.decode(DOCUMENT, type=m.PolicyDocument) == document


@pytest.mark.parametrize(
    "document",
    [
        b'{"version":0,"config":{"primary":"kv"}}',
        b'{"version":1,"config":{"primary":""}}',
        b'{"version":1,"config":{"primary":"kv","canary":{"policy":"cost","share":0}}}',
        b'{"version":1,"config":{"primary":"kv","weight":3}}',
        b'{"version":1,"config":{"primary":"kv","pick_budget_ms":0}}',
    ],
)
def test_a_document_that_means_nothing_is_refused(document: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(document, type=m.PolicyDocument)
