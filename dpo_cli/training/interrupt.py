"""SIGINT and SIGTERM during a training."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

from dpo_cli.utils import distributed


class StopSignal:
    """SIGINT and SIGTERM as a flag that the loop reads between micro-batches; a second signal ends the process at once.

    In an interactive session, whose variables outlive a run, the second signal raises KeyboardInterrupt. Outside the
    main thread signals are left alone. After an error on one of several ranks SIGTERM is ignored: the launcher sends it
    when another rank has ended, and it would hide the message of the error.
    """

    requested = False

    def __enter__(self) -> StopSignal:
        handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            ignored = error is not None and number == signal.SIGTERM and distributed.world_size() > 1
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
