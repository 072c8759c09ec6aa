"""Run a command: errors become one line and an exit code."""

import sys
from collections.abc import Callable
from io import TextIOWrapper

from safetensors import SafetensorError

from configs.files import printable
from configs.schema import LabError


def run_command(command: Callable[[], int], when_stopped: str) -> int:
    """The exit code of `command`; 2 for a problem that the user can fix, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # in a notebook it is something else
            stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a letter
    try:
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


def one_line(error: Exception) -> str:
    return printable("error: " + " ".join(str(error).splitlines()))
