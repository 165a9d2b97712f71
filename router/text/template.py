"""The chat template of a model, rendered as `transformers.apply_chat_template` does, without transformers.

Templates come with the model and are code: they run in jinja2's immutable sandbox. Messages are data to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateFailed(ValueError):
    """The template refused these messages, or could not make sense of them."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is nothing but its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(jinja2.TemplateError):
    """What a template says itself, with `raise_exception`."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter this does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template and the special tokens that it may name. Raises TemplateFailed when `source` does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the chat template does not compile: {error}") from error
        self._names = {
            **self._template.globals,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **special_tokens,
        }
        self._knows_developer = "developer" in source

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The prompt up to where the assistant begins to speak. Raises TemplateFailed."""
        if not self._knows_developer:
            # Templates older than OpenAI's role "developer" mean the same thing by "system".
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            # As `Template.render`, which merges all names anew for each call, for twice the price.
            context = self._template.new_context({**self._names, "messages": messages}, shared=True)
            return "".join(self._template.root_render_func(context))
        except _Refused as error:
            raise TemplateFailed(str(error)) from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # What a template's own expressions raise; its text speaks of template variables, which helps nobody.
            raise TemplateFailed("the model's chat template cannot render these messages") from error
