"""The signals that ask the process to stop."""

import signal


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT, and SIGHUP unless the starter of this process ignores it, as `nohup` does."""
    # SIGINT is always handled: a shell ignores it for background processes without meaning it.
    ignores_hang_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hang_up else [signal.SIGHUP])]
