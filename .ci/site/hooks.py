"""What the site needs beyond the pages: files outside docs/ that they link to, and formulas that need no script."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# As arithmatex leaves formulas.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
OUTSIDE = re.compile(r"\]\(\.\./(?P<path>[^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/."""
    # Pages in folders of docs/ link to others in docs/ that way.
    pages = [page for page in files.documentation_pages() if "/" not in page.src_uri]
    for path in {match["path"] for page in pages for match in OUTSIDE.finditer(page.content_string)}:
        files.append(File.generated(config, f"outside/{path}.txt", content=(ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Link to them where the site has them, and to a report's own page rather than to the Markdown of it."""
    markdown = markdown.replace("/report.md)", "/report.html)")
    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(r"](outside/\g<path>.txt", markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers draw themselves."""

    def drawn(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"])
        if match["open"] == "(":
            return convert(tex)
        # Wider than a phone, some of them.
        return f'<div style="overflow-x: auto">{convert(tex, display="block")}</div>'

    return FORMULA.sub(drawn, content)
