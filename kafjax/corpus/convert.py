"""HTML, reStructuredText, Word and PDF files as text: by way of HTML, which becomes Markdown, so
that headings and code are kept.

The libraries are the extra `[documents]`. What a file asks to be read or run beside it is not: no
includes, no scripts, no links.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.text import shortened

MOST_UNPACKED = 2**29
"""Bytes that the parts of a Word file may unpack to."""
_NO_TEXT = ("head", "script", "style", "noscript", "template", "svg", "nav")


def html(data: bytes) -> str:
    """Converts HTML to Markdown. Its encoding is the one it declares. Scripts, styles and
    navigation are left out."""
    soup = _library("bs4", "html").BeautifulSoup(data, "html.parser")
    title = soup.title.get_text().strip() if soup.title else ""
    for tag in soup(_NO_TEXT):
        tag.decompose()
    return (
        _markdown(soup)
        if soup.h1 or not title
        else f"# {' '.join(title.split())}\n\n{_markdown(soup)}"
    )


def rst(data: bytes) -> str:
    """Converts reStructuredText to Markdown. Raises `ValueError` for text that is no UTF-8."""
    core = _library("docutils.core", "reStructuredText")
    settings = {
        "_disable_config": True,  # no docutils.conf of the folder or the user
        "doctitle_xform": False,
        "file_insertion_enabled": False,
        "halt_level": 5,
        "initial_header_level": 1,
        "input_encoding": "unicode",
        "raw_enabled": False,
        "report_level": 5,
        "syntax_highlight": "none",
    }
    text = _known_directives(data.decode("utf-8-sig"))
    body = core.publish_parts(text, writer="html5", settings_overrides=settings)["body"]
    return html(body.encode())


def docx(data: bytes) -> str:
    """Converts a Word file to Markdown: headings by their styles, lists and tables. Pictures are
    left out."""
    mammoth = _library("mammoth", "Word files")
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        if sum(part.file_size for part in parts.infolist()) > MOST_UNPACKED:
            raise ValueError(f"unpacks to over {MOST_UNPACKED >> 20} MB")
    found = mammoth.convert_to_html(io.BytesIO(data), convert_image=lambda image: [])
    return html(found.value.encode())


def pdf(data: bytes) -> str:
    """Extracts the text of a PDF file, a form feed between its pages."""
    pypdf = _library("pypdf", "PDF")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of every oddity of a file
    return "\f".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages)


CONVERTERS: dict[str, Callable[[bytes], str]] = {
    ".html": html,
    ".htm": html,
    ".rst": rst,
    ".docx": docx,
    ".pdf": pdf,
}
"""Converters by the ending of the file."""


def convert(file: Path, data: bytes) -> str:
    """Converts a file's contents by its ending, to Markdown, or a PDF's to text with form feeds.

    Raises:
      UserError: a library is missing, or the file is broken or locked.
    """
    try:
        return CONVERTERS[file.suffix.lower()](data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except RecursionError as error:
        raise UserError(
            f"{file}: nested too deeply to be read; convert it to .md or .txt"
        ) from error
    except Exception as error:  # parsers of other people's formats fail in ways of their own
        why = shortened(str(error) or type(error).__name__, 100, str)
        kind = file.suffix[1:].lower()
        raise UserError(
            f"{file}: cannot be read as {kind} ({why}); convert it to .md or .txt, or move it away"
        ) from error


def _markdown(soup: Any) -> str:
    converter = _library("markdownify", "HTML").MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
        code_language_callback=_language,
    )
    return converter.convert_soup(soup).strip()


def _language(element: Any) -> str:
    names = [
        *element.get("class", ()),
        *(name for code in element.find_all("code", limit=1) for name in code.get("class", ())),
    ]
    of_docutils = [
        name for name in names if "code" in names and name not in ("code", "literal-block")
    ]
    return next(
        (name.removeprefix("language-") for name in names if name.startswith("language-")),
        next(iter(of_docutils), ""),
    )


def _known_directives(text: str) -> str:
    """Turns directives that docutils does not know, Sphinx's, into plain containers: else it drops
    the text that stands in them."""
    directives = importlib.import_module("docutils.parsers.rst.directives")
    languages = importlib.import_module("docutils.parsers.rst.languages.en")

    def known(match: re.Match[str]) -> str:
        name = match[2].lower()
        is_known = (
            name in languages.directives
            or name in directives._directive_registry
            or name in ("code-block", "sourcecode")
        )
        return (
            match[0] if is_known else f"{match[1]}.. container::\n\n{match[1]}   {match[3].strip()}"
        )

    return re.sub(r"^([ \t]*)\.\. ([\w:-]+)::(.*)$", known, text, flags=re.MULTILINE)


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"reading {what} needs more packages: pip install 'kafjax[documents]', or convert it to .md or .txt"
        ) from error
