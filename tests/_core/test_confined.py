"""What a file names lies within its folder, or is refused."""

from pathlib import Path

import pytest

from rotsparse._core.confined import confined


@pytest.mark.parametrize("name", ["a.npy", "deep/er.npy", "ü" * 100])
def test_names_within_the_folder(name):
    assert confined(Path("run"), name, "manifest.json") == Path("run") / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "deep/../../a", "/etc/passwd", "a\0b", "a" * 256, "ü" * 128, "\ud800" * 100, 3, None],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"manifest\.json names"):
        confined(Path("run"), name, "manifest.json")
