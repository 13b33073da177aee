"""`python -m bench.fp8_training` and `bench.fp8_products`: rows, verdict, picture, and what is measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.kernels.fp8_linear import Recipe
from automodel_accel.patches.fp8 import RECIPES
from bench import fp8_products, fp8_training
from bench.fp8_curves import BASELINE, FINAL, smoothed, verdicts

TINY = ["--tiny", "--steps", "12", "--seeds", "2", "--noise-seeds", "2", "--recipes", "tensorwise"]


def row(recipe: str, seed: int, final: float, held_out: float) -> dict[str, Any]:
    return {"recipe": recipe, "seed": seed, "final_loss": final, "held_out_loss": held_out}


def test_one_command_trains_judges_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    code = fp8_training.main([*TINY, "--out", str(tmp_path), "--plot", str(picture)])
    rows = [json.loads(line) for line in (tmp_path / "fp8_training.jsonl").read_text().splitlines()]
    assert [(one["recipe"], one["seed"]) for one in rows] == [
        *((BASELINE, 0), ("tensorwise", 0), (BASELINE, 1), ("tensorwise", 1))
    ]
    base, fp8, other, _ = rows
    assert base["fp8_calls"] == 0
    assert fp8["fp8_calls"] == 12 * 2 * 4, "q, k and v; o; gate and up; down; in two layers"
    assert len(base["losses"]) == 12
    assert base["losses"][0] != other["losses"][0], "another seed, other weights and text"
    assert base["losses"][0] == pytest.approx(fp8["losses"][0], rel=1e-2), "the same weights and text"
    assert base["losses"][-1] < base["losses"][0]
    assert {"commit", "versions", "device_name", "time"} <= base.keys()
    printed = capsys.readouterr().out
    within = all(verdict.within for verdict in verdicts(rows))
    assert code == int(not within)
    assert ("outside" in printed) is not within
    assert picture.read_bytes().startswith(b"\x89PNG")
    # what is there already is judged again without training, and a worse loss is outside
    path = tmp_path / "fp8_training.jsonl"
    path.write_text(
        "\n".join(json.dumps({**one, "held_out_loss": one["seed"] + 9.0 * (one is rows[3])}) for one in rows)
    )
    assert fp8_training.main(["--read", "--out", str(tmp_path)]) == 1
    assert "outside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "within"),
    [
        ((1.0, 3.0), True),
        ((3.8, 5.8), True),
        ((3.9, 5.9), False),  # the mean is allowed 2 sqrt(2) sqrt(2 / 2) = 2.83
        ((-1.9, 0.1), False),
        ((4.9, -0.9), True),
        ((5.1, -1.1), False),  # one difference is allowed 2 sqrt(2) sqrt(2) = 4
        ((math.nan, 3.0), False),
    ],
)
def test_a_recipe_is_within_where_it_differs_as_seeds_do(losses: tuple[float, float], within: bool) -> None:
    rows = [row(BASELINE, seed, 5.0 + seed, loss) for seed, loss in enumerate((1.0, 3.0))]
    rows += [row("rowwise", seed, 5.0 + seed, loss) for seed, loss in enumerate(losses)]
    last, held_out = verdicts(rows)
    assert held_out.noise == pytest.approx(math.sqrt(2))
    assert last.within
    assert held_out.within is within


def test_more_seeds_of_bfloat16_make_the_noise() -> None:
    rows = [row(BASELINE, seed, loss, 0.0) for seed, loss in enumerate((1.0, 3.0, 5.0))]
    last, _ = verdicts([*rows, row("rowwise", 0, 2.5, 0.0)])
    assert last.noise == pytest.approx(2.0)
    assert last.differences == (1.5,)
    assert last.allowed == pytest.approx(2 * 2 * math.sqrt(2))


def test_curves_are_smoothed_over_the_steps_that_are_judged() -> None:
    losses = [float(step) for step in range(FINAL + 5)]
    assert smoothed(losses)[:2] == [0.0, 0.5]
    assert smoothed(losses)[-1] == sum(losses[-FINAL:]) / FINAL


@pytest.mark.parametrize("wrong", [["--seeds", "7"], ["--seeds", "0"], ["--noise-seeds", "1", "--seeds", "1"]])
def test_noise_takes_seeds(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fp8_training.main(wrong)
    assert "--noise-seeds" in capsys.readouterr().err


def test_held_out_paragraphs_are_not_trained_on() -> None:
    trained_on, held_out = fp8_training.texts()
    seen = {bytes(tokens) for tokens in trained_on.tokens}
    assert len(held_out.tokens) > 100
    assert not [tokens for tokens in held_out.tokens if bytes(tokens) in seen]


def place(gradient: torch.Tensor) -> fp8_products.Place:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 32, generator=generator) for rows in (64, 32))
    return fp8_products.Place(
        "q", x[None], [weight[:16], weight[16:]], {1: gradient[None, :, 16:], 0: gradient[None, :, :16]}
    )


def test_powers_of_two_are_exact_and_small_gradients_are_zeroed() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(64, 32, generator=generator)
    # E4M3 reaches 2^-9 / 448 of the largest, E5M2 2^-16 / 57344
    gradient[:16] *= 2.0**-24
    found = {name: fp8_products.figures(place(gradient), recipe) for name, recipe in RECIPES.items()}
    assert found["tensorwise"]["zeroed_input"] == pytest.approx([0.25, 0.25], abs=0.01)
    assert found["tensorwise"]["tokens"][0] < 1
    assert max(found["rowwise"]["zeroed_input"]) < 0.01
    assert found["rowwise"]["tokens"][0] > 20
    assert max(found["tensorwise_e5m2"]["zeroed_input"]) < 0.05
    assert found["tensorwise"]["input"][0] > found["tensorwise_e5m2"]["input"][0] + 2, "a bit of mantissa more"
    exact = fp8_products.figures(
        fp8_products.Place("q", torch.eye(32), [torch.eye(32)], {0: 2 * torch.eye(32)}), Recipe()
    )
    assert exact["forward"] == exact["input"] == exact["weight"] == [math.inf]


def test_each_linear_of_an_input_is_looked_at_by_itself() -> None:
    gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    gradient[:, :16] *= 2.0**-24
    found = fp8_products.figures(place(gradient), Recipe())
    assert found["zeroed_weight"] == pytest.approx([1.0, 0.0], abs=0.01)
    assert found["weight"] == pytest.approx([0.0, 28.5], abs=2.0)


def test_values_are_taken_from_every_linear_of_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fp8_products.main(["--tiny", "--steps", "4", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "fp8_products.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4
    names = [
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    for one in rows:
        assert list(one["places"]) == names
        assert all(
            10 < value < 60
            for figures in one["places"].values()
            for name in fp8_products.SQNR
            for value in figures[name]
        )
    assert "tensorwise_e5m2" in capsys.readouterr().out
