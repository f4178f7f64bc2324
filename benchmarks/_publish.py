"""Tables of the benchmarks go into the documentation between markers."""

from pathlib import Path


def publish(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a Markdown file.

    Raises `ValueError` where the file has no such markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{path} has no markers {begin} and {end}")
    before, after = old.split(begin)[0], old.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
