"""SIGTERM and SIGINT: the first is recorded and polled where a step can be interrupted, the second one kills.

State exists at step boundaries only: a signal inside a step waits for the next one or falls back to the last.
"""

import contextlib
import os
import signal
import time

from runtime.ranks import all_gather

TO_FINISH_S = 10  # seconds that the updates of a step have to finish in after a signal


class Stopped(Exception):
    """A rank received a signal; `Signals.poll` raises this on all ranks."""


class Signals(contextlib.AbstractContextManager):
    """A context manager that restores the previous handlers. `catch` installs its own."""

    def __init__(self):
        self.number = 0  # of the first signal received
        self.received_s = 0.0
        self.mid_update = False  # whether the weights had left the last step boundary when the run stopped
        self.handlers = {}

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self):
        """Install the handlers, once there is state to save; before that a signal ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.handle)

    def handle(self, number, frame):
        # A launcher repeats the signal that its ranks have received already: within a second it is the same.
        if self.number and time.monotonic() > self.received_s + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.received_s = number, time.monotonic()
            os.write(2, b"\nstopping; a second signal ends this process at once\n")  # print is not reentrant

    def received(self):
        """Whether this rank has received a signal."""
        return self.number > 0

    def poll(self, mid_update=False):
        """Collective: raise Stopped on all ranks once one of them has received a signal. mid_update: the
        weights have left the last step boundary; the step gets TO_FINISH_S seconds to reach the next one."""
        waits = mid_update and time.monotonic() < self.received_s + TO_FINISH_S
        number = max(all_gather(0 if waits else self.number))
        if number:
            self.number, self.mid_update = number, mid_update
            raise Stopped
