"""What several test files share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Data that is too large for the repository. Tests that need it are skipped where it is not."""
