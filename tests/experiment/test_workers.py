"""Worker processes that share the threads."""

import platform
import signal
import subprocess
import sys

import pytest

from experiment.workers import side_by_side
from tests.helpers import ROOT, tensor_hashes, train_tiny


def test_two_workers_train_the_same_models_as_one(tiny_run, tmp_path):
    recipes = "recipes={distilled: {access: logits}}"
    part = ("workers=2", "seeds=[0]", "controls=[baseline,second_teacher]", "verdicts=[]", recipes)
    assert train_tiny(tmp_path, *part) == 0  # both teachers side by side too
    found, whole = tensor_hashes(tmp_path / "tiny"), tensor_hashes(tiny_run)
    assert len(found) == 5
    assert found.items() <= whole.items()


WHILE_IMPORTED = signal.getsignal(signal.SIGINT)


def opened():
    """A worker imports this module to find this function, before it can set any handler."""


def ctrl_c_while_imported():
    return WHILE_IMPORTED


def test_a_worker_leaves_ctrl_c_to_its_parent_from_its_first_import_on():
    before = signal.getsignal(signal.SIGINT)
    found = dict(side_by_side({"job": (ctrl_c_while_imported,)}, 1, opened, ()))
    assert found == {"job": signal.SIG_IGN}
    assert signal.getsignal(signal.SIGINT) is before


# Steps that free 8 MB and take as much again; prints the number of page faults.
STEPS = """
import resource
import numpy
from experiment.workers import keep_freed_memory

def steps(count):
    for _ in range(count):
        taken = [numpy.ones(2**17) for _ in range(8)]
        del taken

keep_freed_memory()
steps(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_freed_by_a_step_is_kept_for_the_next():
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) < 100  # of 40,960
