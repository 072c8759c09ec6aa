"""Worker processes that share the threads of a machine.

Tiny models gain little from a second thread; two of them train side by side instead.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from threading import RLock, Thread
from typing import Any

import torch
from tqdm import tqdm

from configs.command import ctrl_c
from configs.schema import LabError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def side_by_side(
    jobs: dict[str, tuple], workers: int, opened: Callable[..., None], arguments: tuple
) -> Iterator[tuple[str, Any]]:
    """Run {name: (function, *arguments)} in worker processes; yields (name, result) as each ends.

    Every process first calls `opened(*arguments)`, with its share of the threads set. An exception
    in a job ends them all and is raised here; a process that was killed is a LabError.
    """
    threads = max(1, torch.get_num_threads() // workers)
    return_freed_memory()
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(threads, opened, arguments),
    ) as pool:
        try:
            with ctrl_c(signal.SIG_IGN):  # the workers inherit it, and import without a traceback
                running = {
                    pool.submit(function, *rest): name for name, (function, *rest) in jobs.items()
                }
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            raise LabError(
                "a worker was killed, perhaps because memory ran out; rerun the same command to "
                "resume, or use workers=1 under another name=..., which needs less"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MB that a step frees for the next one. Otherwise it returns
    most of it to the system and requests it again, at every step of a small model."""
    of_glibc("mallopt", M_MMAP_THRESHOLD, 32 * 2**20)
    of_glibc("mallopt", M_TRIM_THRESHOLD, 256 * 2**20)


def return_freed_memory() -> None:
    """Return to the system what the C library keeps: after making outputs, half of this process's
    memory."""
    of_glibc("malloc_trim", 0)


def of_glibc(function: str, *arguments: int) -> None:
    """Call a function that only glibc has; other systems keep little, or have no such setting."""
    called = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if called:
        called(*arguments)


def start_worker(threads: int, opened: Callable[..., None], arguments: tuple) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent does."""
    tqdm.set_lock(RLock())  # the default would be a system-wide semaphore
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    opened(*arguments)
