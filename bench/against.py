"""Ourselves at another commit, as one more variant: its kernels, measured by today's benchmark."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.peers import OURS, PEERS
from bench.rows import git
from bench.variants import ROOT, Variant


@contextlib.contextmanager
def revision(name: str) -> Iterator[Variant]:
    """While entered, a work tree of that revision lies in a temporary folder.

    Raises:
        ValueError: git does not know the revision, or the revision has no package.
    """
    commit = git("rev-parse", "--short=12", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise ValueError(f"--against {name}: git knows no such revision; give a commit, a branch or a tag.")
    with tempfile.TemporaryDirectory() as temporary:
        tree, overlay = Path(temporary) / "tree", Path(temporary) / "overlay"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            if not (tree / "automodel_accel").is_dir():
                raise ValueError(f"--against {name}: there is no automodel_accel at {commit}.")
            overlay.mkdir()
            (overlay / "automodel_accel").symlink_to(tree / "automodel_accel")
            (overlay / "bench").symlink_to(ROOT / "bench")
            yield Variant(f"{OURS}@{commit}", PEERS[OURS], root=overlay)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True)
