"""Run a command: errors become one line and an exit code."""

import sys
from collections.abc import Callable

from safetensors import SafetensorError

from configs.schema import LabError


def run_command(command: Callable[[], int], when_stopped: str) -> int:
    """The exit code of `command`; 2 for a problem that the user can fix, 130 for Ctrl-C."""
    try:
        return command()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        resume = "no work is lost; rerun the same command to resume"
        print(f"error: {error}; {resume}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {when_stopped}", file=sys.stderr)
        return 130
