"""Docstrings are written with Sphinx's roles, as Sentence Transformers' are; the site's Markdown knows none."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

from griffe import Docstring, Extension, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[^`<>]+)`")
MATH = re.compile(r":math:`(?P<tex>[^`]+)`")
LITERAL_BLOCK = re.compile(r"^(?P<indent> *)::\n\n(?P<code>(?:(?P=indent)    .*\n?|\n)+)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Roles(Extension):
    """Turns roles into links, formulas into what the pages write."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of each object as it is loaded."""
        if obj.docstring is not None:
            obj.docstring = Docstring(
                markdown_of(obj.docstring.value),
                lineno=obj.docstring.lineno,
                endlineno=obj.docstring.endlineno,
                parent=obj,
                parser=obj.docstring.parser,
                parser_options=obj.docstring.parser_options,
            )


def markdown_of(text: str) -> str:
    """A docstring's roles as Markdown."""
    text = ROLE.sub(_link, text)
    text = MATH.sub(lambda match: f"${match['tex']}$", text)
    text = LITERAL_BLOCK.sub(_fenced, text)
    # The one heading of the two that the site knows.
    return EXAMPLE.sub("Examples:", text)


def _fenced(match: re.Match[str]) -> str:
    return indent(f"```python\n{dedent(match['code']).strip()}\n```\n", match["indent"])


def _link(match: re.Match[str]) -> str:
    name = match["name"]
    shown = name.rpartition(".")[2] if match["short"] else name
    # A name that is written out in full has a place on the site; others stand for themselves.
    return f"[`{shown}`][{name}]" if name.startswith("st_linear.") else f"`{shown}`"
