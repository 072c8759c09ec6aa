"""What all commands share: errors in one line, exit codes, Ctrl-C, and threads that sleep.

Imported before torch, whose import takes seconds.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from threading import current_thread, main_thread

from safetensors import SafetensorError

from configs.files import printable
from configs.schema import LabError

# How often a thread of GNU's OpenMP looks for work before it sleeps. By default 300,000 times: then
# a small model is many times slower beside a busy program. If it slept at once, a training with two
# threads would take twice as long on an idle machine (`make benchmark`).
SPINS = "5000"


def sleep_soon() -> None:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def run_command(command: Callable[[], int], when_stopped: str) -> int:
    """The exit code of `command`; 2 for a problem that the user can fix, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # in a notebook it is something else
            stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a letter
    try:
        with ctrl_c(signal.default_int_handler):
            return command()
    except LabError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(
            one_line(error) + "; no work is lost; rerun the same command to resume", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {when_stopped}", file=sys.stderr)
        return 130


@contextmanager
def ctrl_c(handler: Callable | signal.Handlers) -> Iterator[None]:
    """What Ctrl-C does meanwhile. Processes started meanwhile ignore it if `handler` does."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or current_thread() is not main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def one_line(error: Exception) -> str:
    return printable("error: " + " ".join(str(error).splitlines()))
