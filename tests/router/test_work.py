"""Placed work: tokens by who will compute them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.work import PlacedWork

WORKERS = [None, WorkerId("a"), WorkerId("b")]
steps = st.lists(
    st.tuples(
        st.sampled_from(["place", "claim", "done"]),
        st.sampled_from([RequestId("1"), RequestId("2"), RequestId("3")]),
        st.sampled_from(WORKERS),
        st.integers(0, 50),
    ),
    max_size=40,
)


@given(steps)
def test_it_counts_what_a_plain_list_counts(taken: list[tuple[str, RequestId, WorkerId | None, int]]):
    work, model = PlacedWork(), {}
    for what, request, worker, tokens in taken:
        if what == "place":
            work.place(request, worker, tokens)
            model[request] = worker, tokens
        elif what == "claim" and worker is not None:
            work.claim(request, worker)
            if request in model:
                model[request] = worker, model[request][1]
        elif what == "done":
            work.done(request)
            model.pop(request, None)
    assert len(work) == len(model)
    for worker in WORKERS:
        assert work.tokens(worker) == sum(tokens for where, tokens in model.values() if where == worker)
