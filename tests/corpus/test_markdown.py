"""Markdown and its kin: passages under their headings, lines that stay lines, and places in the
file that can be looked up."""

from __future__ import annotations

import io
import time
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.core.records import Document, Source
from kafjax.corpus.chunking import cut
from kafjax.corpus.files import read_documents
from kafjax.corpus.folder import load_passages
from kafjax.corpus.markdown import blocks, clean

PAGE = """---
title: "The Guide"
---
<!-- a secret
of two lines -->
Intro, é.
# Install {#top}

Run it <!-- not this --> now
at once. See `<!-- this -->` there.

On [Linux](http://x)
---
- one
- two

```py
# no heading

x = 1
```

| a | b |
|---|---|
| 1 | 2 |
| 3 | 4 |

## Empty
## Other
1. Install it.
> quoted
> lines
"""


def passages(text, size=None, name="g.md"):
    kept, title, cuts = clean(text)
    return cut([Document(name, kept, title, "markdown", Source(name), cuts)], size)


def test_each_heading_starts_a_passage_that_begins_with_the_path_of_headings():
    assert [p.text for p in passages(PAGE)] == [
        "The Guide: Intro, é.",
        "The Guide > Install: Run it now at once. See `<!-- this -->` there.",
        "The Guide > Install > On Linux: - one - two\n```py\n# no heading\n\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
        "The Guide > Install > Empty",
        "The Guide > Install > Other: 1. Install it. quoted lines",
    ]


def test_every_passage_knows_its_lines_and_bytes():
    data = PAGE.encode()
    for size in (None, "sentence", 4):
        for passage in passages(PAGE, size):
            first, behind = passage.source.bytes
            shown = data[first:behind].decode()
            assert data[:first].count(b"\n") + 1 == passage.source.lines[0]
            assert passage.source.lines[1] == passage.source.lines[0] + shown.count("\n")
            if not any(mark in shown for mark in ("<!-- not", "```", "|", ">", "#")):
                assert " ".join(shown.split()) in passage.text
    assert str(passages(PAGE)[1].source) == "g.md:9-10 (Install)"


def test_code_and_tables_that_are_cut_keep_their_lines_and_what_stands_around_them():
    code = "```sh\n" + "".join(f"  run step {i}\n" for i in range(8)) + "```\n"
    table = "|n|m|\n|-|-|\n" + "".join(f"|{i}|x|\n" for i in range(8))
    found = [p.text for p in passages(code + "\n" + table, 12)]
    assert all(text.startswith("```sh\n  run") and "\n```" in text for text in found[:2])
    assert found[0] == "```sh\n" + "".join(f"  run step {i}\n" for i in range(4)) + "```"
    assert "|n|m|\n|-|-|\n|7|x|" in found[-1] or found[-1].startswith("|n|m|\n|-|-|\n")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("````\n```\n# in\n```\n````\n# out\nText.", ["````\n```\n# in\n```\n````", "out: Text."]),
        ("Setext\n===\nText.", ["Setext: Text."]),
        ("---\nno front matter here\n\n---\nText.", ["no front matter here Text."]),
        ("+++\ntitle = 'Tome'\n+++\nText.", ["Tome: Text."]),
        ("a <!-- never closed\n\nb", ["a <!-- never closed b"]),
        ("# A\r\n\r\nText.\r\n# B\r\nMore.", ["A: Text.", "B: More."]),
        ("#hashtag no heading", ["#hashtag no heading"]),
        ("    indented\n    code", ["```\n    indented\n    code\n```"]),
        ("# 見出し\n東京は首都です。大阪も大きい。", ["見出し: 東京は首都です。大阪も大きい。"]),
        ("# Only a heading", ["Only a heading"]),
    ],
)
def test_kinds_of_blocks(text, kept):
    assert [p.text for p in passages(text)] == kept


LINES = [
    "# A",
    "## B",
    "text.",
    "- item",
    "```",
    "    code",
    "<!-- c -->",
    "<!--",
    "-->",
    "---",
    "|a|",
    "|-|",
    "> q",
    "",
]


@given(st.lists(st.sampled_from(LINES)))
def test_any_page_is_cut_and_no_bytes_are_outside_of_the_file(lines):
    text = "\n".join(lines)
    for passage in passages(text, 3):
        first, behind = passage.source.bytes
        assert 0 <= first <= behind <= len(text.encode()) and 1 <= passage.source.lines[
            0
        ] <= passage.source.lines[1] <= max(1, len(lines))


def test_pages_that_make_parsers_slow_are_cut_in_no_time():
    began = time.perf_counter()
    for text in (
        "> " * 20_000,
        "<!-- " * 20_000,
        "```\n" * 5001,
        "[" * 20_000,
        "\n# a" * 5000,
        "|" * 20_000,
        "- " * 20_000,
    ):
        blocks(clean(text)[0])
    assert time.perf_counter() - began < 10


def word_file() -> bytes:
    body = (
        '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Harbour</w:t></w:r></w:p>'
        "<w:p><w:r><w:t>The ferry leaves at noon.</w:t></w:r></w:p>"
    )
    schemas = "http://schemas.openxmlformats.org"
    document = f'<w:document xmlns:w="{schemas}/wordprocessingml/2006/main"><w:body>{body}</w:body></w:document>'
    kinds = f'<Types xmlns="{schemas}/package/2006/content-types"><Default Extension="xml" ContentType="a/xml"/></Types>'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as parts:
        parts.writestr("[Content_Types].xml", kinds)
        parts.writestr("word/document.xml", document)
    return out.getvalue()


def pdf_file(texts) -> bytes:
    """A PDF with one line of text a page, as small as the format allows."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(texts)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(texts), kids),
    ]
    objects.append(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    for i, text in enumerate(texts):
        stream = b"BT /F1 12 Tf 72 700 Td (%s) Tj ET" % text.encode()
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R>>"
            % (5 + 2 * i)
        )
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    return (
        bytes(out)
        + b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
        % (
            len(objects) + 1,
            table,
            len(objects) + 1,
            start,
        )
    )


HTML = """<html><head><title>Harbour</title><meta charset="windows-1252"><script>x()</script></head><body><nav>menu</nav>
<p>The café opens <b>early</b>.</p><h2>Code</h2><pre><code class="language-py">a = 1

b_c = 2</code></pre></body></html>"""
RST = """Harbour
=======

The ferry leaves. See :ref:`tides`.

.. versionadded:: 3
   The pier.

.. include:: /etc/passwd

.. code-block:: python

   a = 1
   b = 2
"""


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        (
            "a.html",
            HTML.encode("windows-1252"),
            ["Harbour: The café opens **early**.", "Harbour > Code:\n```py\na = 1\n\nb_c = 2\n```"],
        ),
        (
            "a.rst",
            RST.encode(),
            [
                "Harbour: The ferry leaves. See :ref:`tides`. 3 The pier.\n```python\na = 1\nb = 2\n```"
            ],
        ),
        ("a.docx", word_file(), ["Harbour: The ferry leaves at noon."]),
        (
            "a.pdf",
            pdf_file(["The ferry leaves at noon.", "The pier is old."]),
            ["The ferry leaves at noon.\x0cThe pier is old."],
        ),
    ],
)
def test_other_formats_are_read(tmp_path, name, data, texts):
    (tmp_path / name).write_bytes(data)
    found = load_passages(tmp_path)
    assert [p.text for p in found] == texts
    assert all(p.source.file == name and p.source.bytes is None for p in found)


def test_passages_of_a_pdf_know_their_page(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_file(["The ferry leaves at noon.", "The pier is old."]))
    assert [(p.text, str(p.source)) for p in load_passages(tmp_path, "sentence")] == [
        ("The ferry leaves at noon.", "a.pdf, page 1"),
        ("The pier is old.", "a.pdf, page 2"),
    ]


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(
        UserError, match=rf"{name}: cannot be read as .*convert it to \.md or \.txt"
    ) as caught:
        list(read_documents(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.html").write_text("<p>x</p>")
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(UserError, match=r"a\.html: .*pip install 'kafjax\[documents\]'"):
        list(read_documents(tmp_path))
