"""The one rule for what is printed: text from outside is text, and never a command to whatever shows it.

Names of files and folders, errors, and what stands in files of others may hold terminal escapes, characters that change
the direction of writing, and the markup of Markdown or HTML. Everything that is shown goes through one of these.
"""

import html as _html
import re
import unicodedata

# Control characters, formatting (such as right-to-left marks), halves of pairs, line and paragraph separators.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}

_MARKUP = re.compile(r"[\\`*|<>\[\]&~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def visible(text: object, *, lines: bool = False) -> str:
    r"""The text with every character that is invisible or controls a terminal written out, such as `\x1b`. With `lines`
    line breaks and tabs stay what they are."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if (lines and c in "\n\t") or not _invisible(c) else _written(c) for c in text)


def markdown(text: object) -> str:
    """The text as a cell of a Markdown table, or within a line."""
    return _MARKUP.sub(r"\\\g<0>", visible(text))


def html(text: object) -> str:
    """The text within HTML, in attributes too."""
    return _html.escape(visible(text, lines=True))


def _invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE


def _written(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
