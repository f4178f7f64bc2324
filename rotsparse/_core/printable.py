"""Escape text from outside before it is shown, so that terminals, Markdown and HTML show it literally.

Names of files and folders, error messages and the content of files may contain terminal escapes, characters that change
the direction of writing, and markup. Everything that is shown goes through one of these functions.
"""

import html as _html
import re
import unicodedata

# Control characters, formatting (such as right-to-left marks), halves of pairs, line and paragraph separators.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}

_MARKUP = re.compile(r"[\\`*|<>\[\]&~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def visible(text: object, *, lines: bool = False) -> str:
    r"""The text with every invisible or control character escaped, such as `\x1b`. With `lines`, line breaks and tabs
    are kept."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if (lines and c in "\n\t") or not _invisible(c) else _written(c) for c in text)


def markdown(text: object) -> str:
    """The text escaped for a cell of a Markdown table, or for a line of Markdown."""
    return _MARKUP.sub(r"\\\g<0>", visible(text))


def html(text: object) -> str:
    """The text escaped for HTML, including attributes."""
    return _html.escape(visible(text, lines=True))


def _invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE


def _written(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
