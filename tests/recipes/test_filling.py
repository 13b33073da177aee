"""Dataclasses from entries."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from automodel_accel.recipes.filling import fill, to_plain, to_yaml
from automodel_accel.recipes.reading import RecipeError, parse


@dataclass(frozen=True, kw_only=True)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stable:
    kind: Literal["wsd"] = "wsd"
    decay: int = 10

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise ValueError(f"decay is {self.decay}; expected a number of steps.")


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    folder: Path | None = None
    dtype: Literal["bfloat16", "float32"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Top:
    model: Model
    schedule: Cosine | Stable = field(default_factory=Cosine)
    lr: float = 1e-4
    steps: int | None = None
    packed: bool = True
    betas: tuple[float, ...] = (0.9, 0.999)
    groups: dict[str, float] = field(default_factory=dict)
    target: str | list[str] | None = None
    clip: float | Literal[False] = 1.0
    more: dict[str, Any] = field(default_factory=dict)


def top(text: str) -> Top:
    return fill(Top, parse(text, "r.yaml"))


def test_every_type() -> None:
    made = top(
        "model: {name: x, folder: /a/b, dtype: bfloat16}\nschedule: {kind: wsd, decay: 3}\nlr: 1\nsteps: 1e3\npacked: false\n"
        "betas: [0.9, 1]\ngroups: {'*.bias': 0}\ntarget: [q, k]\nclip: false\nmore: {a: [1, {b: null}]}"
    )
    assert made == Top(
        model=Model(name="x", folder=Path("/a/b"), dtype="bfloat16"),
        schedule=Stable(decay=3),
        lr=1.0,
        steps=1000,
        packed=False,
        betas=(0.9, 1.0),
        groups={"*.bias": 0.0},
        target=["q", "k"],
        clip=False,
        more={"a": [1, {"b": None}]},
    )
    assert isinstance(made.lr, float)
    assert isinstance(made.steps, int)


def test_what_is_written_reads_as_the_same() -> None:
    made = top(
        "model: {name: 'null', folder: x}\nlr: 1e-5\nsteps: null\ntarget: ['3', '1e-4', 'no']\nschedule: {kind: wsd}"
    )
    assert fill(Top, parse(to_yaml(made), "w.yaml")) == made
    assert list(to_plain(made)) == list(vars(made))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: x}\noptimiser: 3", "r.yaml:2:1: unknown key 'optimiser'."),
        ("model: {name: x, dtpye: float32}", "r.yaml:1:18: model: unknown key 'dtpye'. Did you mean 'dtype'?"),
        ("lr: 1", "r.yaml:1:1: 'model' is missing: expected a mapping (name, folder, dtype)."),
        ("model: 3", "r.yaml:1:1: model: expected a mapping (name, folder, dtype), got the number 3."),
        ("model: {name: 3}", 'model.name: expected text, got the number 3; for that text write "3".'),
        ("model: {name: x, dtype: bf16}", "r.yaml:1:18: model.dtype: unknown value 'bf16'. Did you mean 'bfloat16'?"),
        ("model: {name: x}\nlr: fast", "r.yaml:2:1: lr: expected a number, got the text 'fast'."),
        ("model: {name: x}\nlr: true", "lr: expected a number, got true."),
        ("model: {name: x}\nsteps: 1.5", "steps: expected a whole number or null, got the number 1.5."),
        ("model: {name: x}\nsteps: .inf", "steps: expected a whole number or null, got the number inf."),
        ("model: {name: x}\npacked: 1", "packed: expected true or false, got the number 1."),
        ("model: {name: x}\npacked: yes", "packed: expected true or false, got the text 'yes'."),
        ("model: {name: x}\nbetas: [0.9, x]", "r.yaml:2:14: betas[1]: expected a number, got the text 'x'."),
        ("model: {name: x}\nbetas: 0.9", "betas: expected a list, each a number, got the number 0.9."),
        ("model: {name: x}\ngroups: {a: b}", "groups.a: expected a number, got the text 'b'."),
        ("model: {name: x}\ntarget: [1]", 'target[0]: expected text, got the number 1; for that text write "1".'),
        ("model: {name: x}\nclip: true", "clip: expected a number or one of False, got true."),
        ("model: {name: x}\nschedule: {warmup: 1}", "schedule: 'kind' is missing: expected one of cosine, wsd."),
        ("model: {name: x}\nschedule: {kind: cosin}", "schedule: unknown kind 'cosin'. Did you mean 'cosine'?"),
        ("model: {name: x}\nschedule: {kind: wsd, warmup: 1}", "schedule: unknown key 'warmup'."),
        (
            "model: {name: x}\nschedule: {kind: wsd, decay: -1}",
            "r.yaml:2:1: schedule: decay is -1; expected a number of steps.",
        ),
        ("model: {name: x}\nschedule: {kind: [1]}", "schedule: unknown kind '[1]'."),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        top(text)
    assert said in str(error.value)


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        top("lr: x\nsteps: y\nmodel: {nam: z}")
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        "r.yaml:1:1",
        "r.yaml:2:1",
        "r.yaml:3:9",
        "r.yaml:3:1",
    ]
