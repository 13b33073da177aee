"""What one of several processes runs: `torchrun --standalone --nproc_per_node 2 -m tests.swap.vocab_distributed FOLDER`.

Each holds its rows of the head as a DTensor. A process leaves FOLDER/rank.json: what each case found wrong, empty where nothing was.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from tests.swap.vocab_heads import CASES, build, check


def main(folder: Path) -> None:
    """Run every case."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    problems = {}
    for name, case in CASES.items():
        problems[name] = ""
        try:
            check(case, *build(case), mesh.get_group(), mesh)
        except AssertionError:
            problems[name] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(problems))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
