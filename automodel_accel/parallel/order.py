"""The order in which a model is spread over processes: tokens of a row, products, torch.compile, then parameters over data ranks.

Adapters and kernels come before, on the whole model: kernels are proved on whole modules, and adapters are cut like the linears
that they adapt. FSDP2 comes last: it sees what torch made of a parameter, and cuts that once more.
"""

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from automodel_accel.config import AccelConfig
from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.facts import Facts
from automodel_accel.parallel import context, tensor, wrap
from automodel_accel.parallel.mesh import Mesh, Ranks
from automodel_accel.parallel.saving import save_whole
from automodel_accel.patches.contract import Counts


def ranks_of(mesh: Mesh | Ranks) -> Ranks:
    """The running processes of a mesh.

    Raises:
        ValueError: it is neither, or its sizes are not those of the run.
    """
    if not isinstance(mesh, Mesh | Ranks):
        raise ValueError(f"mesh is a {type(mesh).__name__}; expected a Mesh, such as Mesh(shard=8), or its ranks().")
    return mesh.ranks() if isinstance(mesh, Mesh) else mesh


def check_not_spread(model: nn.Module, said: str) -> None:
    """A model is spread once.

    Raises:
        ValueError: it was.
    """
    if said:
        raise ValueError(f"this {type(model).__name__} is spread over processes already: {said}.")


def check(model: nn.Module, ranks: Ranks, settings: AccelConfig, facts: Facts) -> None:
    """What can be known of the untouched model.

    Raises:
        ValueError: it cannot be spread so.
    """
    if ranks.mesh.tensor > 1 and settings.fp8 is not False:
        raise ValueError(
            f"fp8 scales values by the largest of a whole tensor, of which {ranks.mesh.tensor} tensor ranks hold parts each; expected "
            "fp8=False, or Mesh(tensor=1)."
        )
    wrap.check(model, ranks, facts)


def check_parameters(model: nn.Module, ranks: Ranks) -> None:
    """What can be known once adapters have frozen what does not train.

    Raises:
        ValueError: it cannot be spread so.
    """
    if ranks.device_mesh is not None and ranks.mesh.wrapping == "fsdp2":
        wrap.check_dtypes(model)


def cut(model: nn.Module, ranks: Ranks) -> list[Refusal]:
    """Give all ranks the same values; cut the tokens of a row over the context ranks, and products over the tensor ranks.

    Raises:
        ValueError: they cannot be cut so. `revert` takes back what was done.
    """
    if ranks.device_mesh is None:
        return []
    wrap.share_values(model, wrap.device_of(ranks.device_mesh))
    context.cut(model, ranks)
    return tensor.cut(model, ranks) if ranks.mesh.tensor > 1 else []


def spread(model: nn.Module, ranks: Ranks, counts: Counts) -> tuple[nn.Module, str]:
    """Compile layers, and spread parameters over the data ranks.

    Returns:
        The model, and how it was spread, in words.
    """
    if ranks.device_mesh is not None:
        save_whole(model, counts)
    if ranks.mesh.compile:
        for layer in wrap.layers_of(model):
            layer.compile()
    spread, said = wrap.spread(model, ranks)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        # DistributedDataParallel on top would average parts of different parameters; with nothing to do it says so
        names = [name for name, _ in model.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
    return spread, f"{ranks.mesh}: {said}{', each layer compiled' * ranks.mesh.compile}"
