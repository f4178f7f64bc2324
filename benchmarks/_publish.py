"""Tables of the benchmarks go into the documentation between markers."""

import os
import tempfile
from pathlib import Path


def publish(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a Markdown file. The file is
    either complete or what it was before.

    Raises `ValueError` where the file has no such markers, or is a symbolic link.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link: name the file itself")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{path} has no markers {begin} and {end}")
    before, after = old.split(begin)[0], old.split(end)[1]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".rotsparse-", delete=False) as new:
        try:
            new.write(f"{before}{begin}\n\n{text}\n{end}{after}")
            new.flush()
            os.chmod(new.name, path.stat().st_mode)
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise
