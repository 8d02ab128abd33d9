"""A pytest plugin, `-p tests.sanitize`: the native kernel is compiled with sanitizers, and what they find ends the run.

The sanitizers' runtimes must be loaded before Python is, and what they say as the process ends must not be captured:
`make sanitize` sees to it.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial

import pytest

from ringattn.kernels import build

# -O1, for a report to name the line; what is found ends the process, for a test cannot catch it.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = (*build.FLAGS, "-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS)


def pytest_configure() -> None:
    """Builds the sanitized library, and has it taken for the native kernel."""
    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise pytest.UsageError("the runtime of AddressSanitizer is not loaded: run `make sanitize`")
    os.environ.pop("LD_PRELOAD", None)  # the compiler needs no sanitizer
    sanitized = partial(build.library, flags=FLAGS)
    if b"__asan_report" not in sanitized("cpu").read_bytes():
        raise pytest.UsageError(f"the compiler took {FLAGS}, but the library has no sanitizer in it")
    pytest.MonkeyPatch().setattr("ringattn.kernels.native.library", sanitized)
