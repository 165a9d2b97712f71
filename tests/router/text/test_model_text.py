"""A model's folder: what is read from it, and that templates render as transformers renders them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import pytest

from hocket.router.text.model_text import ModelText, ModelTextError
from hocket.router.text.template import ChatTemplate, TemplateFailed
from hocket.router.text.tokenize import TokenizerBusy

DEMO = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hocket" / "models" / "SmolLM2-135M-Instruct"
CHATS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "be <b>kind</b>"},
        {"role": "user", "content": "世界 🎉\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<|im_end|> {{ 7 * 7 }} {% raw %}"},
    ],
]
# transformers 5.19, apply_chat_template.
GOLDEN = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
    1,
    4093,
    198,
    1780,
    314,
    216,
    34,
    27,
    34,
    47,
    2,
    198,
    1,
    520,
    9531,
    198,
]
LOOP = "{% for m in messages %}"
TEMPLATES = [
    LOOP + "<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{{ eos_token }}",
    "{{ bos_token }}{%- for m in messages -%}\n  {% if loop.first %}A{% endif %}\n  {{ m | tojson }}\n{%- endfor %}",
    LOOP
    + "{{ m | tojson(indent=2) }}{% endfor %}{{ tools is none }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}",
    LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endif %}"
    "{{ m.content[::-1] }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_template_renders_as_transformers_renders_it(source, chat) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    [wanted], _ = render_jinja_template([chat], chat_template=source, add_generation_prompt=True, **special)
    assert ChatTemplate(source, special).render(chat) == wanted


@pytest.mark.skipif(not (DEMO / "tokenizer.json").is_file(), reason="the demo model is not here: hocket model demo")
@pytest.mark.parametrize("chat", CHATS)
async def test_the_demo_models_prompts_are_what_transformers_makes_of_them(chat) -> None:
    from transformers import AutoTokenizer

    text = ModelText.load(DEMO)
    reference = AutoTokenizer.from_pretrained(str(DEMO))
    [ids] = await text.encode([text.render_chat(chat)], add_special_tokens=False)
    assert ids == reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    text.close()


@pytest.mark.skipif(not (DEMO / "tokenizer.json").is_file(), reason="the demo model is not here: hocket model demo")
async def test_the_demo_models_prompt_has_its_golden_ids() -> None:
    text = ModelText.load(DEMO)
    [ids] = await text.encode(
        [text.render_chat([{"role": "user", "content": "What is 2+2?"}])], add_special_tokens=False
    )
    assert ids == GOLDEN
    assert (text.context_tokens, text.eos_ids, text.vocab_size) == (8192, {2}, 49152)
    text.close()


def test_a_template_is_sandboxed() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os }}"):
        with pytest.raises(TemplateFailed):
            ChatTemplate(source, {}).render(CHATS[0])


def test_what_a_template_cannot_render_is_said_in_its_own_words_or_plainly() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateFailed, match="^roles must alternate$"):
        refusing.render(CHATS[0])
    with pytest.raises(TemplateFailed, match="cannot render"):
        ChatTemplate("{{ messages[9].content + 1 + 'x' }}{{ 1 / 0 }}", {}).render(CHATS[0])
    with pytest.raises(TemplateFailed, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_a_developer_message_is_a_system_message_to_templates_that_know_none() -> None:
    chat = [{"role": "developer", "content": "x"}]
    assert ChatTemplate("{{ messages[0].role }}", {}).render(chat) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}", {}).render(chat) == "developer"
    assert chat == [{"role": "developer", "content": "x"}]


def test_a_folder_gives_its_limits_stops_and_template(folder) -> None:
    (folder / "config.json").write_text(
        json.dumps({"text_config": {"max_position_embeddings": 512}, "eos_token_id": 3})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}old"}]}
        )
    )
    text = ModelText.load(folder)
    assert (text.context_tokens, text.eos_ids) == (512, {3, 5})
    assert text.render_chat(CHATS[0]) == "<s>old"
    text.close()
    (folder / "chat_template.jinja").write_text("new")
    text = ModelText.load(folder)
    assert text.render_chat(CHATS[0]) == "new"
    text.close()


def test_a_bare_tokenizer_is_enough_but_for_chats(folder) -> None:
    text = ModelText.load(folder)
    assert (text.context_tokens, text.eos_ids) == (None, frozenset())
    with pytest.raises(TemplateFailed, match="no chat template"):
        text.render_chat(CHATS[0])
    text.close()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{", "cannot read .*tokenizer.json"),
        ("config.json", "{", "cannot read .*config.json"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_a_broken_folder_is_refused_with_the_files_name(folder, file, content, said) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ModelTextError, match=said):
        ModelText.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path) -> None:
    with pytest.raises(ModelTextError, match="has no tokenizer.json"):
        ModelText.load(tmp_path)


async def test_long_prompts_are_tokenized_in_a_thread_and_short_ones_at_once(folder) -> None:
    text = ModelText.load(folder)
    before = threading.active_count()
    short = await text.encode(["the fox"], add_special_tokens=False)
    assert threading.active_count() == before
    long = await text.encode(["the fox" * 5000], add_special_tokens=False)
    assert threading.active_count() > before
    assert short[0] * 2 == (await text.encode(["the foxthe fox"], add_special_tokens=False))[0]
    assert text.decode(long[0]) == "the fox" * 5000
    text.close()


async def test_long_prompts_beyond_the_bound_are_refused_and_cancelled_ones_still_count(folder) -> None:
    text = ModelText.load(folder)
    prompt = "the quick brown fox " * 20_000
    waiting = [asyncio.create_task(text.encode([prompt], add_special_tokens=False)) for _ in range(64)]
    await asyncio.sleep(0)
    with pytest.raises(TokenizerBusy):
        await text.encode([prompt], add_special_tokens=False)
    assert await text.encode(["short"], add_special_tokens=False)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    text.close()


def test_a_text_has_at_least_as_many_tokens_as_is_said_without_tokenizing(folder, byte_level) -> None:
    text = ModelText.load(folder)
    for sample in ("", "a", "the quick brown fox " * 50, "世界🎉" * 30, " " * 500):
        assert text.tokens_min(sample) <= len(byte_level.encode(sample).ids)
    assert text.tokens_min("x" * 100_000) > 1000
    text.close()


def test_truncation_and_padding_in_the_folder_are_ignored(folder, byte_level) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    text = ModelText.load(folder)
    [ids] = asyncio.run(text.encode(["the quick brown fox"], add_special_tokens=False))
    assert ids == byte_level.encode("the quick brown fox").ids
    text.close()


def test_one_token_alone_has_its_bytes_and_special_ones_their_name(folder, byte_level) -> None:
    text = ModelText.load(folder)
    assert text.token_bytes(byte_level.token_to_id("<|im_end|>")) == b"<|im_end|>"
    assert b"".join(text.token_bytes(i) for i in byte_level.encode("🦊").ids) == "🦊".encode()
    assert text.token_bytes(-1) == text.token_bytes(10**6) == b""
    text.close()
