"""A folder for the servers of a test run: in memory if there is enough, because a database has three hundred files."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gateway.ops.local import stores

MEMORY, ENOUGH_BYTES, LEFT_OVER_S = Path("/dev/shm"), 2 << 30, 600.0
PREFIX = "nz-"


def new_folder() -> Path:
    place = MEMORY if _is_usable(MEMORY) else None
    if place:
        _remove_left_over(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    # Root's servers run as another user, who must be able to enter.
    folder.chmod(0o711)
    return folder


def _is_usable(place: Path) -> bool:
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return False
    has_space = shutil.disk_usage(place).free >= ENOUGH_BYTES
    return has_space and not os.statvfs(place).f_flag & os.ST_NOEXEC


def _remove_left_over(place: Path) -> None:
    """Removes what killed runs have left, as it takes up memory."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_mtime < time.time() - LEFT_OVER_S and not stores.is_running(folder):
                shutil.rmtree(folder, ignore_errors=True)
