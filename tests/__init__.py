"""The tests. All their processes share Python's bytecode, outside the source tree: also where none is to be written there."""

import os
import sys
from pathlib import Path

os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(Path(__file__).resolve().parent.parent / ".pytest_cache/bytecode")
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
sys.dont_write_bytecode = False
