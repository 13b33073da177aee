"""Loading: the last checkpoint that is whole, into a model on any mesh."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from automodel_accel.checkpoint import catalog, state
from automodel_accel.checkpoint.agreement import Agreement
from automodel_accel.checkpoint.catalog import Entry
from automodel_accel.checkpoint.errors import DamagedError
from automodel_accel.checkpoint.saving import FORMAT, KINDS, STATE, rank_file
from automodel_accel.checkpoint.tensors import Stored, read

Stores = dict[str, dict[str, Stored]]


def candidates(root: Path, step: int | None, agreement: Agreement[Any]) -> tuple[list[Entry], list[str]]:
    """The checkpoints to try, last saved first, as rank 0 sees them; and what is wrong with others.

    Raises:
        ValueError: there is none of that step.
    """
    found, problems = agreement.alone(lambda: catalog.entries(root))
    if step is None:
        return found, problems
    chosen = [entry for entry in found if entry.step == step]
    if not chosen:
        steps = sorted({entry.step for entry in found})
        why = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(f"{root} has no complete checkpoint of step {step}, but of {steps or 'none'}{why}.")
    return chosen, []


def first_whole(root: Path, found: Sequence[Entry], problems: list[str], agreement: Agreement[Any]) -> Entry | None:
    """The first whose files are what was written; the ranks share the reading. Warns of each that is not.

    Raises:
        DamagedError: there are some, but none is whole.
    """
    for entry in found:
        own = sorted(entry.files)[agreement.rank :: agreement.size]
        try:
            agreement.together(lambda entry=entry, own=own: entry.check(own))  # type: ignore[misc]
        except DamagedError as error:
            problems = [*problems, str(error)]
            continue
        if problems and agreement.rank == 0:
            said = "\n".join(problems)
            warnings.warn(
                f"Damaged checkpoints were passed over:\n{said}\nGoing on from {entry.folder}, step {entry.step}.",
                RuntimeWarning,
                stacklevel=4,
            )
        return entry
    if problems:
        raise DamagedError(f"{root} has no checkpoint that is whole:\n" + "\n".join(problems))
    return None


def read_state(entry: Entry) -> tuple[dict[str, Any], Stores]:
    """What is the run's, and where its tensors lie.

    Raises:
        ValueError: a format of another version.
    """
    if (found := entry.about["format"]) != FORMAT:
        raise ValueError(f"{entry.folder} has format {found}; this version reads format {FORMAT}.")
    saved = json.loads((entry.folder / STATE).read_bytes())
    stores = {kind: {name: _stored(*row) for name, row in saved["tensors"][kind].items()} for kind in KINDS}
    return saved, stores


def _stored(dtype: str, shape: list[int], parts: list[Any]) -> Stored:
    found = [(file, key, tuple(offsets), tuple(sizes)) for file, key, offsets, sizes in parts]
    return Stored(dtype, tuple(shape), found)


def read_tensors(
    entry: Entry, model: nn.Module, optimizers: Sequence[Optimizer], saved: Mapping[str, Any], stores: Stores
) -> None:
    """Fill a model in place, and give optimizers their states; nothing is changed before all is known to fit.

    Raises:
        ValueError: it is another model, or others are its optimizers; says in what.
    """
    here = state.named_tensors(model, saved.get("frozen", True))
    if wrong := state.differences(model, here, {"config": saved["config"], "tensors": stores["model"]}):
        raise ValueError(f"{entry.folder} is of another model: {'; '.join(wrong)}.")
    targets = {}
    if optimizers:
        targets = state.optimizer_targets(model, optimizers, saved["optimizers"], stores["optimizer"])
    with torch.no_grad():
        read(entry.folder, stores["model"], here)
        read(entry.folder, stores["optimizer"], targets)
    if optimizers:
        state.put_optimizers(model, optimizers, saved["optimizers"], targets)


def read_random_state(entry: Entry, rank: int, device: torch.device) -> None:
    """Set the generators of this rank; one that there was not when it was saved is seeded by step and rank."""
    if rank < entry.about["world_size"]:
        own = json.loads((entry.folder / rank_file(rank)).read_bytes())
        state.put_random_state(own["random"], device)
    else:
        state.seed_everything(state.seed_of_new_rank(entry.step, rank))


def data_state(entry: Entry, data_rank: int, data_size: int) -> Any:
    """Where the data of this rank goes on, in JSON's types.

    As many ranks with rows of their own as when it was saved: each its own state. Another number: the one state, if it was the same on
    all of them (such as a count of the rows that all have seen together).

    Raises:
        ValueError: none was saved, or their number is another and their states differ.
    """
    of_ranks = entry.about["data_ranks"]
    if data_size == max(of_ranks) + 1:
        return _data(entry, of_ranks.index(data_rank))
    states = [_data(entry, rank) for rank in range(len(of_ranks))]
    if any(one != states[0] for one in states):
        raise ValueError(
            f"{entry.folder}: {max(of_ranks) + 1} ranks read rows of their own when it was saved, and each had another position; now "
            f"there are {data_size}. Resume on as many, let data.state_dict() count over all ranks, or leave data out and say where "
            "it goes on."
        )
    return states[0]


def _data(entry: Entry, rank: int) -> Any:
    own = json.loads((entry.folder / rank_file(rank)).read_bytes())
    if "data" not in own:
        raise ValueError(f"{entry.folder} was saved without data; leave data out.")
    return own["data"]
