"""A clock that is off, for the processes that are given it: a library that the loader puts before the C library."""

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += %d;
    return status;
}
"""


def skewed(folder: Path, seconds: int) -> dict[str, str]:
    """Give the variables of a process whose clock is so many seconds ahead; skips where there is no C compiler."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to build a clock that is off")
    source, library = folder / "skew.c", folder / "skew.so"
    source.write_text(_SOURCE % seconds)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}
