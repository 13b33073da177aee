"""Models and data that need no download: made of installed packages, kept in Hugging Face's cache.

model:
  path: demo:smollm2
data: {kind: chat, path: demo:chatterbot}
"""

from collections.abc import Callable
from pathlib import Path

from automodel_accel.kernels.contract import unknown_name

PREFIX = "demo:"


def is_demo(name: str) -> bool:
    """Whether it is a name of this kind."""
    return name.startswith(PREFIX)


def resolve(name: str) -> Path:
    """The folder that a name stands for; made at the first call. Touches no network.

    Args:
        name: demo:smollm2 (SmolLM2-135M-Instruct), demo:chatterbot (chats: train, validation), demo:python-manual (documents: train,
            validation), demo:easy-vqa (questions about pictures: train, test), demo:tiny-llava (a model with a vision tower, of random
            weights).

    Raises:
        ValueError: an unknown name, or a package that it takes is not installed.
    """
    makers = _makers()
    made = makers.get(name.removeprefix(PREFIX))
    if made is None:
        raise ValueError(unknown_name("demo", name, [PREFIX + known for known in makers]))
    return made()


def _makers() -> dict[str, Callable[[], Path]]:
    from automodel_accel.demo import chatterbot, easy_vqa, python_manual, smollm2, tiny_llava

    return {
        "smollm2": smollm2.packaged_model,
        "chatterbot": chatterbot.folder,
        "python-manual": python_manual.folder,
        "easy-vqa": easy_vqa.folder,
        "tiny-llava": tiny_llava.folder,
    }
