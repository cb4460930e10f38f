"""The checkout on the path, so that `pytest bench/` finds the bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
