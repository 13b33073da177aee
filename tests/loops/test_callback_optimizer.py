"""What AccelCallback says of an optimizer that does not hold the parameters that train."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from automodel_accel.callback import AccelCallback, check_optimizer
from tests.loops.callback_runs import trainer_of
from tests.tiny import tiny


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-3)


def _with_masters(model: nn.Module) -> torch.optim.Optimizer:
    """Holds copies in higher precision, as apex does, in flat pieces, as DeepSpeed does."""
    flat = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
    return _adamw([flat.requires_grad_()])


def _lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda model: _adamw(model.parameters()),
        lambda model: _adamw(parameter for parameter in model.parameters() if parameter.requires_grad),
        lambda model: _adamw([*model.parameters(), nn.Parameter(torch.zeros(1))]),
        lambda model: LayerWiseDummyOptimizer({}),
        _with_masters,
        lambda model: None,
    ],
    ids=["all", "trained", "a loss's own", "layer-wise dummy", "flat masters", "none"],
)
@pytest.mark.parametrize("prepare", [lambda model: model, _lora], ids=["full", "lora"])
def test_right_optimizers_pass_without_a_word(
    prepare: Callable[[Any], Any], optimizer_of: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = prepare(tiny(tie_word_embeddings=True))
    check_optimizer(model, optimizer_of(model))
    assert not caplog.records


def test_replaced_parameters_are_named_and_refused(tmp_path: Path) -> None:
    model = tiny()
    optimizer = _adamw(model.parameters())
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(48, 32, bias=False)
    trainer = trainer_of(tmp_path, AccelCallback(), model=model, given={"optimizers": (optimizer, None)})
    names = r"model\.layers\.0\.mlp\.down_proj\.weight, model\.layers\.1\.mlp\.down_proj\.weight, but 2 parameters that are not"
    with pytest.raises(ValueError, match=names) as error:
        trainer.train()
    assert "Leave `optimizers` out of Trainer(...)" in str(error.value)


def test_the_optimizer_of_another_model_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight, .* and \d+ more"):
        check_optimizer(model, _adamw(copy.deepcopy(model).parameters()))


def test_an_optimizer_from_before_the_adapter_is_refused() -> None:
    """It holds the base model, which the adapter froze: nothing would move."""
    model = tiny()
    optimizer = _adamw(model.parameters())
    with pytest.raises(ValueError, match=r"lora_A.* but none that train"):
        check_optimizer(_lora(model), optimizer)


def test_training_a_part_is_logged_with_the_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(tie_word_embeddings=False)
    chosen = [parameter for name, parameter in model.named_parameters() if name != "lm_head.weight"]
    trainer = trainer_of(tmp_path, AccelCallback(), model=model, given={"optimizers": (_adamw(chosen), None)})
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        trainer.train()
    said = [record.message for record in caplog.records if record.name == "automodel_accel"]
    assert said == ["the optimizer does not hold lm_head.weight, which require gradients; they will not move."]


def test_layer_wise_training_by_hooks_is_not_in_the_way(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(), given={"optimizers": (LayerWiseDummyOptimizer({}), None)})
    trainer.train()
    assert trainer.state.global_step == 3
