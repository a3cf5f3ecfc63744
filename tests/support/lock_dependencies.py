"""Pins what setup.cfg asks for, with hashes, for every Python and platform; one set of versions for all three files."""

import subprocess
import sys
from pathlib import Path

ALL = "tests/requirements.txt"
FILES = {ALL: ["local", "dev"], "gateway/requirements-local.txt": ["local"], "gateway/requirements.txt": []}
UV = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate"]
FIXED = ["--python-version", "3.11", "--custom-compile-command", "make lock", "--upgrade"]


def main() -> None:
    Path(ALL).unlink(missing_ok=True)
    for file, extras in FILES.items():
        wanted = [option for extra in extras for option in ("--extra", extra)]
        same = [] if file == ALL else ["--constraint", ALL]
        print(f"pinning {file}")
        subprocess.run([*UV, *FIXED, *wanted, *same, "setup.cfg", "--output-file", file], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
