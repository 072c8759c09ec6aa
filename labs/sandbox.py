"""Limits for a submission: time, memory, processes, files and network, as far as the system has
them: all on Linux 5.13 or later, time everywhere."""

import contextlib
import ctypes
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

CPU_SECONDS = 300  # of all calls together
LONGEST_REPLY = 2**26  # bytes


@dataclass(frozen=True)
class Limits:
    """seconds: of each call; megabytes: of memory; file_megabytes: of each file that is written."""

    seconds: float = 20.0
    megabytes: int = 4_000  # torch reserves more than it uses
    file_megabytes: int = 16
    processes: int = 64

    def exchange(self, process: subprocess.Popen, request: bytes) -> bytes | None:
        """The reply to a request; None if there is none in time, or none of a sensible size."""

        def send() -> None:  # a process that does not read would hold up the grader
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(request)
                process.stdin.flush()

        threading.Thread(target=send, daemon=True).start()
        end, received = time.monotonic() + self.seconds, bytearray()
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not waiting.select(left):
                    return None
                part = os.read(process.stdout.fileno(), 2**16)
                received += part
                if not part or len(received) > LONGEST_REPLY:
                    return None
        return bytes(received)

    def end(self, process: subprocess.Popen) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def limited_command(command: list[str], limits: Limits, folder: Path) -> list[str]:
    """A command under these limits, which may write in `folder` alone."""
    limiter = [sys.executable, str(Path(__file__)), str(limits.megabytes)]
    limiter += [str(limits.file_megabytes), str(limits.processes + threads_of_user()), str(folder)]
    return [*own_network(), *limiter, *command]


def threads_of_user() -> int:
    """Those that run already: the system's limit counts them, too."""
    me, count = psutil.Process().username(), 0
    for process in psutil.process_iter(["username", "num_threads"]):
        count += (process.info["num_threads"] or 0) if process.info["username"] == me else 0
    return count


def own_network() -> list[str]:
    """A command's beginning that leaves it without a network, where the system allows it."""
    found = ["unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare"):
        return []
    allowed = subprocess.run([*found, "true"], capture_output=True, check=False).returncode == 0
    return found if allowed else []


def limit_self(megabytes: int, file_megabytes: int, processes: int, folder: Path) -> None:
    """Of this process and those it starts."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)  # if the grader is killed
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (processes,) * 2)
    restrict_files([*readable(), folder], [folder])


# -- files: Landlock, in Linux since 5.13 (docs.kernel.org/userspace-api/landlock.html) ------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all machines
LIST = 1 << 3  # a folder
READ = 1 << 0 | 1 << 2 | LIST  # and execute
EVERYTHING = (1 << 13) - 1  # all rights of the first version
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2  # rights that a file can have
NO_NEW_PRIVILEGES = 38  # of prctl
PATH_BENEATH = 1


class Ruleset(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def readable() -> list[Path]:
    """What a submission needs: Python and its packages, the system, the project without the labs'
    solutions and checks."""
    root = Path(__file__).parent.parent
    rooms = ("configs", "models", "tasks", "teacher", "measure", "student")
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/dev", "/proc", "/sys")
    python = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent}
    found = [*map(Path, system), *python]
    found += [root / room for room in rooms]
    found += [file for file in (root / "labs").glob("*.py") if not file.name[3:4].isdigit()]
    return [path for path in found if path.exists()]


def restrict_files(reading: list[Path], writing: list[Path]) -> bool:
    """Let this process read and write only there; whether the system could."""
    if platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    handled = Ruleset(EVERYTHING)
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if ruleset < 0:
        return False
    root = [Path(__file__).parent.parent]  # Python lists it to find modules
    writable = [*writing, Path("/dev/null")]
    for paths, rights in ((reading, READ), (root, LIST), (writable, EVERYTHING)):
        for path in paths:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if path.is_dir() else rights & OF_FILES
            rule = PathBeneath(allowed, descriptor)
            libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(descriptor)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


if __name__ == "__main__":
    limit_self(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
    os.execvp(sys.argv[5], sys.argv[5:])
