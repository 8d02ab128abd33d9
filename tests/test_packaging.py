"""What is installed is what stands in the tree: every package, the C++ sources, and the mark of being typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "ringattn", "csrc")


def build(kind: str, folder: Path, into: Path) -> Path:
    """Builds an sdist or a wheel of a tree, without network, and returns the archive."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel was unpacked into, which was built of the sdist: so neither lacks anything."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    with tarfile.open(build("sdist", tree, folder)) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def files(folder: Path, pattern: str = "*") -> set[str]:
    found = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_every_module_is_shipped(installed: Path) -> None:
    expected = files(ROOT / "ringattn", "*.py")
    assert {"__init__.py", "kernels/native.py"} <= expected
    assert files(installed / "ringattn", "*.py") == expected


def test_every_source_is_shipped_as_it_is(installed: Path) -> None:
    expected = files(ROOT / "csrc")
    assert "cpu/api.cpp" in expected
    assert files(installed / "ringattn" / "csrc") == expected
    for name in expected:
        assert (installed / "ringattn" / "csrc" / name).read_bytes() == (ROOT / "csrc" / name).read_bytes()


def test_nothing_else_is_shipped(installed: Path) -> None:
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"ringattn"}
    assert (installed / "ringattn" / "py.typed").is_file()
    assert any(path.match("*.dist-info/licenses/LICENSE") for path in installed.rglob("LICENSE"))


def test_the_installed_package_finds_its_sources(installed: Path, tmp_path: Path) -> None:
    program = "import ringattn; from ringattn.kernels.build import sources; print(ringattn.__file__, sources())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    package = installed / "ringattn"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "csrc")]
