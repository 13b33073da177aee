"""The config files for `accelerate launch`: that accelerate reads them as meant. On a CPU it would not wrap by FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env

import automodel_accel as accel
from tests.tiny import tiny

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate_fsdp2"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` would give each process."""
    arguments = ["--config_file", str(request.param), "--num_machines", "1", "train.py"]
    args: Any = launch_command_parser().parse_args(arguments)
    args, _, _ = _validate_launch_command(args)
    made: dict[str, str] = prepare_multi_gpu_env(args)
    for name, value in made.items():
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    return {**made, "file": request.param.stem}


def test_accelerate_reads_what_is_meant(environment: dict[str, str]) -> None:
    plugin = FullyShardedDataParallelPlugin()
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert plugin.cpu_offload.__class__.__name__ == "OffloadPolicy"
    assert ("SHARDED" in str(plugin.state_dict_type)) == (environment["file"] != "fsdp2_lora")


def test_layers_of_an_applied_model_are_units(environment: dict[str, str]) -> None:
    plugin = FullyShardedDataParallelPlugin()
    model = accel.apply(tiny(), attention=False)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None
    wrapped = [module for module in model.modules() if policy(module)]
    assert wrapped == list(model.model.layers)


def test_hsdp_copies_over_nodes(environment: dict[str, str]) -> None:
    if environment["file"] != "hsdp":
        assert "PARALLELISM_CONFIG_DP_REPLICATE_SIZE" not in environment
        return
    mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.tp_size) == (2, 8, 1)


def test_they_leave_recompute_to_apply() -> None:
    for path in FILES:
        assert yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_activation_checkpointing"] is False
