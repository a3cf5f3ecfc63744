"""Sessions of Claude Code and Codex themselves, where they are installed: on the PATH, or by npm in the folder AGENT_HOME."""

import os
import shutil
import subprocess
from pathlib import Path

LONGEST_S = 100
CLAUDE_TOOLS = "Bash(echo:*),Read"


def executable(name: str) -> str:
    """Its path, or "" if it is not installed."""
    home = os.environ.get("AGENT_HOME")
    folders = [os.environ.get("PATH", ""), *([f"{home}/node_modules/.bin", f"{home}/bin"] if home else [])]
    return shutil.which(name, path=os.pathsep.join(folders)) or ""


def claude_code(lines: str, task: str, home: Path) -> str:
    """What it prints at the end; `lines` are the shell's before it is called. It works in `home`."""
    return _run(f'{lines}\nexec "$0" -p "$1" --allowedTools "{CLAUDE_TOOLS}"', executable("claude"), task, home, {})


def codex(config: str, task: str, home: Path, key: str) -> str:
    folder = home / ".codex"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config)
    # The commands of the tests' models need no sandbox, and a container may have none.
    command = 'exec "$0" exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "$1"'
    return _run(command, executable("codex"), task, home, {"GATEWAY_KEY": key})


def _run(command: str, agent: str, task: str, home: Path, settings: dict[str, str]) -> str:
    ended = subprocess.run(
        ["sh", "-c", command, agent, task],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
