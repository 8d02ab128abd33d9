"""Compiling csrc/ on first use, into torch's folder for extensions, once for all processes of a user.

`torch.utils.cpp_extension.load` would need ninja on the PATH, which an environment that is not activated lacks, and
its lock outlives a process that was killed. So the compiler is called here, under a lock that ends with its owner.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

# The oldest torch whose stable interface the sources use: 2.11.
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", _TARGET)

_WORK = "work-"


class BuildError(Exception):
    """The sources could not be compiled; the message says why, in one line."""


def sources() -> Path:
    """Returns the folder csrc: inside the installed package, or beside it in a checkout.

    Raises:
        BuildError: when it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: there is no csrc in {package}, nor beside it")


def library(name: str, flags: Sequence[str] = FLAGS, root: Path | None = None) -> Path:
    """Returns the compiled library of csrc/<name>, made now if it is not there yet.

    Args:
        name: a folder of csrc; all its .cpp files make up the library.
        flags: of the compiler.
        root: where libraries are kept; None is torch's folder for extensions.
    Raises:
        BuildError: when there are no sources, there is no compiler, it fails, or the folder cannot be written.
    """
    folder = sources() / name
    files = sorted(folder.glob("*.cpp"))
    seen = hashlib.sha256("\0".join([*flags, torch.__version__, platform.machine()]).encode())
    for file in sorted(folder.iterdir()):
        seen.update(file.name.encode() + file.read_bytes())
    root = Path(cpp_extension.get_default_build_root()) if root is None else root
    home = root / f"ringattn-{name}-{seen.hexdigest()[:16]}"
    built = home / "library.so"
    try:
        if built.exists():
            return built
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home / "lock"):
            if built.exists():
                return built
            for left in home.glob(f"{_WORK}*"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=home) as work:
                # Whoever looks sees a whole library or none.
                os.replace(_compile(files, flags, Path(work)), built)
    except OSError as error:
        raise BuildError(f"cannot build in {home}: {error}") from error
    return built


def _compile(files: Sequence[Path], flags: Sequence[str], work: Path) -> Path:
    named: str = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    compiler = shlex.split(named)  # such as "ccache g++"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    target = work / "library.so"

    def compiled(file: Path) -> Path:
        made = work / f"{file.stem}.o"
        _run([*compiler, *flags, *includes, "-c", str(file), "-o", str(made)])
        return made

    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, files))
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    sanitized = [flag for flag in flags if flag.startswith("-fsanitize")]
    libraries = [*paths, "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*compiler, "-shared", *sanitized, *map(str, objects), *libraries, "-o", str(target)])
    return target


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        told = f"there is no C++ compiler {command[0]!r} (g++ or clang++ will do; CXX names another)"
        raise BuildError(told) from error
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]!r} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the C++ compiler {command[0]!r} did not finish within 10 minutes") from error
    if done.returncode:
        lines = done.stderr.splitlines() or ["(it says nothing)"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"the C++ compiler {command[0]!r} failed: {first.strip()[:300]}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process at a time in; the lock goes with the process that holds it."""
    import fcntl  # where there is no fcntl, there is no compiler that takes these sources either

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
