"""Damage small files at random and give them to every reader, for some minutes.

    python tests/fuzz/fuzz.py --minutes 10

A reader must return, or raise `ValueError`; and memory must not grow with what a header promises. A file that does
otherwise is kept, its name and the way to repeat it are printed, and the exit status is 1.
"""

import argparse
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from damage import READERS, damaged, survives

GROWTH = 300  # MB of memory that all readers together may add after the first round


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end, failures, counts = time.monotonic() + 60 * options.minutes, 0, dict.fromkeys(READERS, 0)
    with tempfile.TemporaryDirectory() as outer:
        wholes = {}
        for number, (name, reader) in enumerate(READERS.items()):
            folder = Path(outer) / str(number)
            folder.mkdir()
            reader.make(folder)
            wholes[name] = folder, (folder / reader.damaged).read_bytes()
            assert survives(reader, folder, wholes[name][1]), f"{name}: the whole file is refused"
        start, round_number = _memory(), 0
        while time.monotonic() < end and failures < 20:
            for number, (name, reader) in enumerate(READERS.items()):
                folder, whole = wholes[name]
                content = damaged(reader, whole, np.random.default_rng([options.seed, number, round_number]))
                try:
                    survives(reader, folder, content)
                    if _memory() - start > GROWTH:
                        raise MemoryError(f"memory grew by {_memory() - start:.0f} MB")
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    failures += 1
                    kept = Path(tempfile.gettempdir()) / f"fuzz-{options.seed}-{number}-{round_number}"
                    kept.write_bytes(content)
                    print(f"{name}: {type(error).__name__}; the file is {kept}")
                    traceback.print_exc()
                    start = max(start, _memory())
                counts[name] += 1
            round_number += 1
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{sum(counts.values())} damaged files, {failures} failures, memory grew by {_memory() - start:.0f} MB")
    return 1 if failures else 0


def _memory() -> float:
    """The most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
