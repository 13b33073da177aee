"""The links that make kernels/ and patches/ part of the package, checked before anything is built."""

import sys
from pathlib import Path

from setuptools import setup

for name in ("kernels", "patches"):
    if not (Path(__file__).parent / "automodel_accel" / name).is_dir():
        sys.exit(
            f"automodel_accel/{name} must be a link to ../{name}, but this checkout has lost it (git on Windows without "
            f"symlinks, and some unpackers of archives, do that). Mend it with: git config core.symlinks true && "
            f"git checkout -- automodel_accel/{name}   or: ln -sfn ../{name} automodel_accel/{name}"
        )

setup()
