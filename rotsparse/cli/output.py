"""Output of the command line: text is never taken for markup."""

import rich.console
from rich.text import Text

from rotsparse._core.printable import visible


class Console(rich.console.Console):
    """A console that prints strings literally, without markup or emoji, and shows control characters."""

    def render_str(self, text: str, **options) -> Text:
        """Render a string literally."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(visible(text, lines=True), **options)
