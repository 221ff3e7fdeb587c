"""Runs a command on another kernel: kernels and a root file system fetched once, a guest for each run.

QEMU, mmdebstrap, mke2fs and apt do the work; here is only what ties them together.
"""

from vmatrace.lab.job import Job
from vmatrace.lab.kernels import Kernel, available, cached, fetch_kernel, own_kernel, resolve
from vmatrace.lab.runner import Result, fetch, run

__all__ = [
    "Job",
    "Kernel",
    "Result",
    "available",
    "cached",
    "fetch",
    "fetch_kernel",
    "own_kernel",
    "resolve",
    "run",
]
