"""Text from outside is text: at the console, in Markdown, in HTML."""

from html.parser import HTMLParser

import pytest

from rotsparse._core.intervals import Interval
from rotsparse._core.printable import html, markdown, visible
from rotsparse.evaluation.compare import Comparison
from rotsparse.evaluation.names import LABELS

HOSTILE = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "a\rb\bc\x7f": r"a\rb\x08c\x7f",
    "abc\u202egpj.exe": r"abc\u202egpj.exe",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "line\u2028end": r"line\u2028end",
    "half\udcff": r"half\udcff",
    "né ☃ 日本 \U0001f600": "né ☃ 日本 \U0001f600",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_cannot_be_seen_is_written_out(text):
    assert visible(text) == HOSTILE[text]
    assert visible(visible(text)) == visible(text)
    assert visible("a\n\tb", lines=True) == "a\n\tb" and visible("a\n\tb") == r"a\n\tb"


@pytest.mark.parametrize(
    "text", ["a|b", "`x`", "*a*", "_a_", "[a](http://b)", "<script>", "a\nb", "~~a~~", "&lt;", "# a"]
)
def test_markdown(text):
    shown = markdown(text)
    assert "\n" not in shown and shown.replace("\\", "") == visible(text).replace("\\", "")
    for i, character in enumerate(shown):
        if character in "|`*<[&~#":
            assert shown[i - 1] == "\\"
    assert markdown("svd_weights, r=0.5") == "svd_weights, r=0.5"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x>', "' onload='x", "&lt;", "\x1b[31m", "a\0b"]
)
def test_html(text):
    class Tags(HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attrs):
            self.found.append((tag, attrs))

    parser = Tags()
    parser.found = []
    parser.feed(f'<p title="{html(text)}">{html(text)}</p>')
    assert parser.found == [("p", [("title", visible(text, lines=True))])]
    assert "\x1b" not in html(text) and "\0" not in html(text)


def test_tables_of_hostile_bases():
    metric = next(iter(LABELS))
    table = Comparison({name: {metric: Interval(0.5, 0.4, 0.6)} for name in ("a|b", "[red]c[/x]", "\x1b[31m")})
    lines = table.markdown().splitlines()
    assert len(lines) == 5
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 5
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as shown:
        console.print(table.table())
    assert "[red]c[/x]" in shown.get() and "\x1b[31m" not in shown.get()
