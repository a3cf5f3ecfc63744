"""The signals that ask a process to come to its end."""

import signal


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT and SIGHUP; SIGHUP only where whoever started this process does not ignore it, as `nohup` does."""
    # A shell ignores SIGINT for what it starts in the background, and does not mean it.
    ignores_hang_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hang_up else [signal.SIGHUP])]
