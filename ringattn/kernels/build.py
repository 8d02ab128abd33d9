"""Compiles csrc/ on first use into torch's extension folder, once for all processes of a user.

This module calls the compiler itself. `torch.utils.cpp_extension.load` needs ninja on the PATH, which an environment
that is not activated lacks, and its lock stays behind when a process is killed. The lock here is released by the system
when its process ends.
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

# The sources use torch's stable ABI of this version (2.11) and run with all later versions.
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", _TARGET)

_WORK = "work-"


class BuildError(Exception):
    """Compiling the sources failed. The message is one line with the reason."""


def sources() -> Path:
    """Returns the folder csrc. It is inside the installed package, or next to the package in a checkout.

    Raises:
        BuildError: the folder is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: there is no csrc in {package}, nor next to it")


def library(name: str, flags: Sequence[str] = FLAGS, root: Path | None = None) -> Path:
    """Returns the path of the compiled library of csrc/<name>. Compiles it first if it does not exist yet.

    Args:
        name: a folder of csrc. All of its .cpp files are linked into the library.
        flags: compiler flags.
        root: the folder of compiled libraries. None is torch's extension folder.
    Raises:
        BuildError: there are no sources, there is no compiler, compiling failed, or the folder cannot be written.
    """
    from torch.utils import cpp_extension  # imports setuptools, which takes a quarter of a second

    folder = sources() / name
    files = sorted(folder.glob("*.cpp"))
    digest = hashlib.sha256("\0".join([*flags, torch.__version__, platform.machine()]).encode())
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    root = Path(cpp_extension.get_default_build_root()) if root is None else root
    target_folder = root / f"ringattn-{name}-{digest.hexdigest()[:16]}"
    target = target_folder / "library.so"
    try:
        if target.exists():
            return target
        target_folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(target_folder / "lock"):
            if target.exists():
                return target
            for stale in target_folder.glob(f"{_WORK}*"):  # of a build whose process was killed
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=target_folder) as work:
                # A rename is atomic: other processes see the complete library or none.
                os.replace(_compile(files, flags, Path(work)), target)
    except OSError as error:
        raise BuildError(f"cannot build in {target_folder}: {error}") from error
    return target


def compiler() -> list[str]:
    """Returns torch's C++ compiler, which $CXX names. It may be several words, such as "ccache g++"."""
    from torch.utils import cpp_extension

    command: str = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    return shlex.split(command)


def compile_command(flags: Sequence[str] = FLAGS) -> list[str]:
    """Returns the command that compiles a file, without the file: the compiler, `flags` and torch's header folders."""
    from torch.utils import cpp_extension

    return [*compiler(), *flags, *(f"-isystem{path}" for path in cpp_extension.include_paths())]


def _compile(files: Sequence[Path], flags: Sequence[str], work: Path) -> Path:
    from torch.utils import cpp_extension

    command, target = compile_command(flags), work / "library.so"

    def compile_file(file: Path) -> Path:
        object_file = work / f"{file.stem}.o"
        _run([*command, "-c", str(file), "-o", str(object_file)])
        return object_file

    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_file, files))
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*compiler(), "-shared", *sanitizers, *map(str, objects), *libraries, "-o", str(target)])
    return target


def _run(command: Sequence[str]) -> None:
    name = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        message = f"there is no C++ compiler {name!r} (g++ or clang++ will do; CXX names another)"
        raise BuildError(message) from error
    except OSError as error:
        raise BuildError(f"the C++ compiler {name!r} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the C++ compiler {name!r} did not finish within 10 minutes") from error
    if done.returncode:
        lines = done.stderr.splitlines() or ["(it says nothing)"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"the C++ compiler {name!r} failed: {first.strip()[:300]}")


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file. The system releases it when the process ends."""
    import fcntl  # not on Windows, whose compiler does not take these sources either

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
