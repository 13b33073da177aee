"""38,575 questions on 4,000 pictures of shapes, as the package easy-vqa ships them (MIT licence), in LLaVA's format."""

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

from automodel_accel.demo.cache import made_once, package_folder, version_of

ADVICE = "demo:easy-vqa comes in the package easy-vqa; `pip install easy-vqa --no-deps`."
PARTS = ("train", "test")


def folder() -> Path:
    """train.json and test.json, which names its pictures in the installed package; the test asks on other pictures.

    Raises:
        ValueError: the package is not installed.
    """
    package_folder("easy_vqa", ADVICE)
    package: Any = importlib.import_module("easy_vqa")

    def write(made: Path) -> None:
        for part in PARTS:
            (made / f"{part}.json").write_text(json.dumps(_rows(package, part)), encoding="utf-8")

    # the rows name files of this installation
    place = hash_of(str(Path(package.__file__).parent))
    return made_once(f"easy-vqa-{version_of('easy-vqa')}-{place:x}", write)


def hash_of(text: str) -> int:
    """The same in every process."""
    return zlib.crc32(text.encode())


def _rows(package: Any, part: str) -> list[dict[str, Any]]:
    questions, answers, numbers = getattr(package, f"get_{part}_questions")()
    paths = getattr(package, f"get_{part}_image_paths")()
    return [
        {
            "image": str(Path(paths[number]).resolve()),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for question, answer, number in zip(questions, answers, numbers, strict=True)
    ]
