"""Text of tokens one at a time equals the library's decode of all of them, whatever the tokens are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.router.text.detokenize import (
    LibraryDetokenizer,
    TableDetokenizer,
    TokenTable,
    escape,
    is_byte_level,
    special_ids,
)

TOKENS = st.lists(st.integers(0, 402), max_size=40)


def spoken(detokenizer, ids: list[int]) -> str:
    return "".join([detokenizer.text(token_id) for token_id in ids]) + detokenizer.flush()


@pytest.fixture(scope="session")
def table(byte_level) -> TokenTable:
    return TokenTable(byte_level)


def test_the_kinds_are_told_apart(byte_level, metaspace) -> None:
    assert is_byte_level(byte_level)
    assert not is_byte_level(metaspace)


@settings(max_examples=500, deadline=None)
@given(ids=TOKENS)
def test_the_table_equals_the_full_decode_for_any_tokens(byte_level, table, ids) -> None:
    assert spoken(TableDetokenizer(table), ids) == byte_level.decode(ids, skip_special_tokens=True)


@settings(max_examples=500, deadline=None)
@given(raw=st.binary(max_size=30))
def test_the_table_equals_the_full_decode_for_broken_utf8(byte_level, table, raw) -> None:
    single = {token: token_id for token_id, token in enumerate(table.raw) if len(token) == 1}
    ids = [single[bytes([byte])] for byte in raw]
    assert spoken(TableDetokenizer(table), ids) == byte_level.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_the_table_speaks_any_text_that_was_tokenized(byte_level, table, text) -> None:
    assert spoken(TableDetokenizer(table), byte_level.encode(text).ids) == byte_level.decode(
        byte_level.encode(text).ids
    )


@settings(max_examples=300, deadline=None)
@given(text=st.text("the fox世🎉é\n ", max_size=20))
def test_the_library_path_speaks_any_text_that_was_tokenized(metaspace, text) -> None:
    ids = metaspace.encode(text).ids
    assert spoken(LibraryDetokenizer(metaspace, special_ids(metaspace), []), ids) == metaspace.decode(ids)


def test_the_library_path_goes_on_after_broken_utf8(metaspace) -> None:
    broken = [metaspace.token_to_id(f"<0x{byte:02X}>") for byte in (0x00, 0x80, 0xFF, 0xF0, 0x9F)] * 20
    ids = [*broken, *metaspace.encode("the fox").ids]
    made = spoken(LibraryDetokenizer(metaspace, special_ids(metaspace), []), ids)
    assert "\ufffd" in made
    assert made.endswith("the fox")


@settings(max_examples=300, deadline=None)
@given(prompt=st.lists(st.integers(0, 399), max_size=12), ids=st.lists(st.integers(0, 399), max_size=30))
def test_the_library_path_continues_the_prompts_text(metaspace, prompt, ids) -> None:
    size = metaspace.get_vocab_size()
    prompt, ids = [i % size for i in prompt], [i % size for i in ids]
    whole = metaspace.decode([*prompt, *ids], skip_special_tokens=True)
    before = metaspace.decode(prompt, skip_special_tokens=True)
    made = spoken(LibraryDetokenizer(metaspace, special_ids(metaspace), prompt), ids)
    if "\ufffd" not in whole:  # In broken UTF-8 a byte token changes the text of those before it in hindsight.
        assert made == whole[len(before) :]


def test_the_first_word_after_a_prompt_keeps_its_space(metaspace) -> None:
    prompt, answer = metaspace.encode("the quick").ids, metaspace.encode("brown fox").ids
    assert spoken(LibraryDetokenizer(metaspace, special_ids(metaspace), prompt), answer) == " brown fox"


def test_special_tokens_and_unknown_ids_have_no_text(byte_level, table, metaspace) -> None:
    end = byte_level.token_to_id("<|im_end|>")
    for ids in ([end], [10**6], [-1], [403]):
        assert spoken(TableDetokenizer(table), ids) == ""
    assert spoken(LibraryDetokenizer(metaspace, special_ids(metaspace), []), [10**6, -1]) == ""


@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_escaped_text_is_the_inside_of_a_json_string_on_one_line(text) -> None:
    escaped = escape(text)
    assert json.loads(b'"' + escaped + b'"') == text
    assert len(escaped.decode().splitlines()) <= 1


def test_a_character_split_across_tokens_comes_out_whole(byte_level, table) -> None:
    ids = byte_level.encode("🦊").ids
    assert len(ids) > 1
    detokenizer = TableDetokenizer(table)
    assert [detokenizer.text(token_id) for token_id in ids] == [*[""] * (len(ids) - 1), "🦊"]
    assert detokenizer.is_whole
