"""Words for a body that did not decode: which parameter is wrong, and how."""

from __future__ import annotations

import json
import math
import re

import msgspec

from .errors import ApiError, bad_request

_NOT_YET = {
    "tools": "tools are not supported yet",
    "tool_choice": "tools are not supported yet",
    "tool_calls": "tool calls are not supported yet",
    "functions": "functions are not supported yet",
    "function_call": "functions are not supported yet",
    "response_format": 'the only response_format yet is {"type": "text"}',
    "modalities": "the only modality is text",
    "audio": "audio is not supported",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "reasoning_effort is not supported",
    "verbosity": "verbosity is not supported",
    "web_search_options": "web search is not supported",
    "suffix": "suffix is not supported",
}
# What only the router itself may tell an engine: accepting it from a client would let one touch another's KV.
_INTERNAL = frozenset(
    ("kv_transfer_params", "cache_salt", "priority", "request_id", "prompt_embeds", "chat_template",
     "chat_template_kwargs", "vllm_xargs", "extra_args", "logits_processors", "lora_request")
)  # fmt: skip
_NAMED = re.compile(r"Object (contains unknown|missing required) field `(.*)`$", re.DOTALL)
_TYPED = "Expected `"
_WALK_BYTES_MAX = 64 << 10  # The walk runs in the loop: 1 ms at most.


def explain(error: msgspec.MsgspecError | UnicodeDecodeError | RecursionError, raw: bytes) -> ApiError:
    """The 400 for a body whose decoding raised `error`."""
    if not isinstance(error, msgspec.ValidationError):
        return _malformed(raw)
    text, _, place = str(error).rpartition(" - at `")
    if not text:
        text, place = place, ""
    param = place.partition("$")[2].rstrip("`").removeprefix(".")
    named = _NAMED.match(text)
    if named:
        param = f"{param}.{named[2]}" if param else named[2]
        if named[1] == "missing required":
            return bad_request(f"missing required parameter: {param!r}", param, "missing_required_parameter")
    return _wrong_value(text, param, is_unknown=bool(named))


def _wrong_value(text: str, param: str, *, is_unknown: bool) -> ApiError:
    name = re.split(r"[.\[]", param)[0]
    last = re.sub(r"\[[^\]]*\]", "", param).rpartition(".")[2]
    reason = _NOT_YET.get(name) or _NOT_YET.get(last)
    if reason:
        return bad_request(reason, param, "unsupported_parameter")
    if last in _INTERNAL:
        return bad_request(f"{last} is not accepted from clients", param, "unsupported_parameter")
    if ".content[" in param and (is_unknown or param.endswith(".type")):
        return bad_request("message content can only be text parts yet", param, "unsupported_content")
    if is_unknown:
        return bad_request(f"unknown parameter: {param[:100]!r}", param[:100], "unknown_parameter")
    reason = f"expected `{text.removeprefix(_TYPED)}" if text.startswith(_TYPED) else text
    if not param:
        return bad_request(f"the request body is not valid: {reason}", None, "invalid_body")
    return bad_request(f"invalid value for {param!r}: {reason}", param)


def _malformed(raw: bytes) -> ApiError:
    """Not JSON; or JSON with something in it that JSON does not allow but many writers produce."""
    found = None
    if len(raw) <= _WALK_BYTES_MAX:
        try:
            found = _unwritable(json.loads(raw), "")
        except (ValueError, RecursionError):
            found = None
    if found is None:
        return bad_request("the request body is not valid JSON", None, "invalid_json")
    param, what = found
    return bad_request(f"invalid value for {param!r}: {what}", param or None)


def _unwritable(value: object, path: str) -> tuple[str, str] | None:
    """The path of the first NaN, infinity or lone surrogate."""
    if isinstance(value, float) and not math.isfinite(value):
        return path, f"{value} is not a JSON number"
    if isinstance(value, str) and not _is_unicode(value):
        return path, "the text holds a lone surrogate"
    children: list[tuple[str, object]] = []
    if isinstance(value, dict):
        children = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
    elif isinstance(value, list):
        children = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    for child_path, item in children:
        if not _is_unicode(child_path):
            return path, "a name holds a lone surrogate"
        found = _unwritable(item, child_path)
        if found is not None:
            return found
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
