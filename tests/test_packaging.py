"""What an installation holds: wheel, sdist, editable installs, and the price of the import."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from automodel_accel.cli.findings import MINIMUM

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("automodel_accel", "kernels", "patches", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2], {settings}))"
# -I and -S keep the checkout and its own installation out; dependencies come from a plain folder
LOAD = "import sys, site; site.addsitedir({folder!r}); sys.path.append({dependencies!r}); "
USE = """
import automodel_accel, automodel_accel.kernels.rms_norm as rms_norm, automodel_accel.patches.norm, torch
rms_norm.rms_norm(torch.ones(2, 8), None, 1e-6)
print(automodel_accel.__file__, rms_norm.__file__, automodel_accel.__version__)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is needed to build, links as links."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def build(checkout: Path, hook: str, settings: dict[str, str] | None = None) -> Path:
    """Run a build hook as pip does, and return the file it wrote."""
    target = checkout.parent / hook
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD.format(settings=settings), hook, str(target)]
    printed = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    return target / printed.stdout.splitlines()[-1]


def unpacked(archive: Path) -> Path:
    """An archive's content; for a wheel, what pip would lay into site-packages."""
    folder = archive.parent / "unpacked"
    shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else "gztar")
    return folder


def use(folder: Path, code: str = USE) -> list[str]:
    """What `code` prints in a fresh interpreter that sees `folder` and the dependencies."""
    load = LOAD.format(dependencies=sysconfig.get_path("purelib"), folder=str(folder))
    command = [sys.executable, "-I", "-S", "-c", load + code]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout.split()


def sources(checkout: Path) -> set[str]:
    """What every module of a checkout is called once it is installed."""
    own = (checkout / "automodel_accel").rglob("*.py")
    linked = (path for name in ("kernels", "patches") for path in (checkout / name).rglob("*.py"))
    return {path.relative_to(checkout).as_posix() for path in own} | {
        f"automodel_accel/{path.relative_to(checkout).as_posix()}" for path in linked
    }


def test_wheel_holds_every_module_and_nothing_else(checkout: Path) -> None:
    wheel = build(checkout, "build_wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    data = {"automodel_accel/py.typed", "automodel_accel/kernels/preference.json"}
    assert code == sources(checkout) | data
    assert any(name.endswith("licenses/LICENSE") for name in names)
    package, module, _ = use(unpacked(wheel))
    assert Path(package).is_relative_to(wheel.parent)
    assert Path(module).is_relative_to(wheel.parent)


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter")  # of tarfile, about our own archive
def test_a_wheel_from_the_sdist_is_the_same(checkout: Path) -> None:
    sdist = build(checkout, "build_sdist")
    (again,) = unpacked(sdist).iterdir()
    assert not any(path.is_symlink() for path in again.rglob("*"))
    from_sdist = build(again, "build_wheel")
    from_checkout = build(checkout, "build_wheel")
    assert sorted(zipfile.ZipFile(from_sdist).namelist()) == sorted(zipfile.ZipFile(from_checkout).namelist())


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_installs_use_the_checkout(checkout: Path, mode: str) -> None:
    wheel = build(checkout, "build_editable", {"editable_mode": mode})
    package, module, version = use(unpacked(wheel))
    assert Path(package).resolve() == checkout / "automodel_accel" / "__init__.py"
    assert Path(module).resolve() == checkout / "kernels" / "rms_norm" / "__init__.py"
    assert version == project()["version"]


def test_a_plain_checkout_works(checkout: Path) -> None:
    _, module, _ = use(checkout)
    assert Path(module).resolve() == checkout / "kernels" / "rms_norm" / "__init__.py"


@pytest.mark.parametrize("remains", ["a text file", "nothing"])
def test_a_checkout_that_lost_its_links_is_refused(checkout: Path, remains: str) -> None:
    link = checkout / "automodel_accel" / "kernels"
    link.unlink()
    if remains == "a text file":
        link.write_text("../kernels")
    command = [sys.executable, "-c", BUILD.format(settings=None), "build_wheel", str(checkout.parent)]
    printed = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert printed.returncode != 0
    assert "automodel_accel/kernels must be a link to ../kernels" in printed.stderr
    assert "git config core.symlinks true && git checkout -- automodel_accel/kernels" in printed.stderr


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def test_doctor_checks_the_versions_that_pyproject_asks_for() -> None:
    asked = [requirement.partition(";")[0].strip().partition(">=") for requirement in project()["dependencies"]]
    assert {name: minimum for name, _, minimum in asked} == dict(MINIMUM)


IMPORT = """
import time, torch
start = time.perf_counter()
import automodel_accel
seconds = time.perf_counter() - start
print(seconds, *sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "peft", "accelerate", "triton"}))
"""


def test_import_is_quick_and_brings_no_heavy_package() -> None:
    seconds = []
    for _ in range(4):
        took, *heavy = use(ROOT, IMPORT)
        assert not heavy
        seconds.append(float(took))
        if seconds[-1] < 0.1:
            return
    pytest.fail(f"import automodel_accel takes {min(seconds):.2f} s beyond torch, more than 0.1 s")
