"""Signals that ask a recording to end: raised while it is prepared, obeyed in time later on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """What signals asked for so far.

    While tracing is prepared any of them ends the program at once (nothing is lost yet). Afterwards the first
    ``patience`` Ctrl-C are for the command alone, which the terminal tells as well; SIGTERM and SIGHUP, which
    reach only us, end the recording.
    """

    def __init__(self, patience: int) -> None:
        self.running = False
        self._patience = patience
        self._untold = False
        self._asked: signal.Signals | None = None

    def asked(self) -> signal.Signals | None:
        """The signal that ended the recording; None while it may go on."""
        return self._asked

    def to_tell(self) -> bool:
        """Whether a Ctrl-C was borne since the last call (a handler must not print itself)."""
        untold, self._untold = self._untold, False
        return untold

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Watch the signals within the block. SIGHUP stays ignored where it was (nohup)."""
        watched = [number for number in _WATCHED if not _is_nohup(number)]
        saved = {number: signal.signal(number, self._note) for number in watched}
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.running:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        if number == signal.SIGINT and self._patience > 0:
            self._patience -= 1
            self._untold = True
        elif self._asked is None:
            self._asked = signal.Signals(number)


def _is_nohup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
