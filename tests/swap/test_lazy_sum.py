"""A lazy sum behaves as the tensor that it stands for, and mistakes in it or around it are caught."""

import copy
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.patches import lazy_sum
from automodel_accel.patches.lazy_sum import LazySum, lazy, tensors
from tests.ops.mutation import Mutant
from tests.swap import test_residual as wiring
from tests.swap.compare import assert_close
from tests.swap.layers import FUSED, Layer

api: Any = importlib.import_module("automodel_accel.api")
ROWS = (2, 3, 8)
Use = Callable[[Any], Any]


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    branch, residual = (torch.randn(ROWS, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    return branch, residual


# what a layer may have in hand -> the same of tensors
STATES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "branch": lambda branch, residual: branch,
    "scaled branch": lambda branch, residual: branch * 0.3,
    "sum": lambda branch, residual: residual + branch,
    "sum of a scaled branch": lambda branch, residual: 0.3 * branch + residual,
    "sum of a sum": lambda branch, residual: residual * 2 + (branch + residual),
}

USES: dict[str, Use] = {
    "item": lambda h: h[0, 0, 0].item(),
    "sum": lambda h: h.sum(),
    "negative": lambda h: -h + abs(h),
    "difference": lambda h: h - 1.0,
    "right difference": lambda h: 1.0 - h,
    "quotient": lambda h: h / 3,
    "rounded quotient": lambda h: torch.div(h, 0.3, rounding_mode="floor") + h,
    "right quotient": lambda h: 1.0 / (h.abs() + 1),
    "floor division": lambda h: (h // 0.3).detach() + h,
    "power": lambda h: (h**2, 2**h),
    "product": lambda h: (h * 3, 3 * h, h * h, h * torch.ones(8), torch.ones(8) * h),
    "product by function": lambda h: (torch.mul(h, 2), torch.mul(torch.full(ROWS, 2.0), h)),
    "product of a product": lambda h: h * 0.3 * 0.7,
    "sum with a scaled one": lambda h: (h * 0.3) + (h * 0.7),
    "sum with a number": lambda h: h + 1,
    "sum with a row": lambda h: h + torch.ones(8),
    "sum with itself": lambda h: h + h,
    "sum with another dtype": lambda h: (h + torch.ones(ROWS, dtype=torch.float64)).dtype,
    "sum with integers": lambda h: h + torch.ones(ROWS, dtype=torch.long),
    "sum with a factor": lambda h: torch.add(h, torch.ones(ROWS), alpha=0.3),
    "sum by method": lambda h: h.add(torch.ones(ROWS), alpha=2),
    "sum with a complex": lambda h: (h + torch.ones(ROWS, dtype=torch.complex64)).real,
    "comparison": lambda h: (h > 0) & (h < 1) | (h <= -1) | (h >= 2),
    "equality": lambda h: (h == h, h != h),
    "matrix product": lambda h: h @ torch.ones(8, 2).to(h.dtype),
    "linear": lambda h: F.linear(h, torch.ones(4, 8, dtype=h.dtype)),
    "concatenation": lambda h: torch.cat([h, h], -1),
    "einsum": lambda h: torch.einsum("bsh,h->bs", h, torch.ones(8, dtype=h.dtype)),
    "where": lambda h: torch.where(h > 0, h, torch.zeros(())),
    "view": lambda h: h.view(-1, 8),
    "transposed": lambda h: h.transpose(0, 1).reshape(-1),
    "chunks": lambda h: h.chunk(2, -1),
    "unpacked": lambda h: [row * 2 for row in h],
    "indexed": lambda h: (h[:, 1], h[..., None], h[h > 0], h[torch.tensor([1, 0])]),
    "cast": lambda h: h.double().float(),
    "moved": lambda h: h.to("cpu", torch.float32),
    "dropout that is off": lambda h: (F.dropout(h, 0.0), F.dropout(h, 0.5, training=False)),
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "dropout by keyword": lambda h: F.dropout(input=h, p=0.5, training=True),
    "modules": lambda h: nn.Sequential(nn.Dropout(0.0), nn.Identity(), nn.Softmax(-1))(h),
    "metadata": lambda h: str([tuple(h.shape), h.dtype, h.device, h.ndim, h.dim(), h.size(), h.size(-1), len(h)]),
    "more metadata": lambda h: str([h.numel(), h.requires_grad, h.is_floating_point(), h.stride(), h.is_leaf]),
    "like it": lambda h: torch.zeros_like(h),
    "copies": lambda h: (h.clone(), pickle.loads(pickle.dumps(h.detach())), copy.deepcopy(h.detach())),
    "truth of one": lambda h: bool(h[0, 0, 0] > 0),
    "numbers": lambda h: [float(h[0, 0, 0]), int(h[0, 0, 0] * 10)],
    "added in place": lambda h: _augmented(h),
    "written": lambda h: _written(h),
    "detached": lambda h: h.detach() * 2 + h,
}


def _augmented(h: Any) -> Any:
    alias = h = h * 1
    h += 1.0
    h *= torch.full((8,), 2.0)
    h -= 0.5
    h /= 3.0
    return h + alias


def _written(h: Any) -> Any:
    alias = h = h * 1
    h[..., 2] = 5.0
    h.mul_(2.0)
    torch.nn.init.constant_(h[:, :1], 4.0) if not h.requires_grad else h.masked_fill_(torch.ones(8) > 2, 1.0)
    return alias


def outcome(use: Use, state: str, wrap: Callable[[torch.Tensor], Any]) -> tuple[list[Any], list[torch.Tensor]]:
    """What the use gives, as plain values and tensors, and the gradients of both leaves."""
    branch, residual = leaves()
    torch.manual_seed(0)
    found = use(STATES[state](wrap(branch * 1), residual))
    values = [getattr(value, "tensor", value) for value in (found if isinstance(found, tuple | list) else [found])]
    total = sum(
        (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum()
        for value in values
        if isinstance(value, torch.Tensor) and value.requires_grad
    )
    grads = torch.autograd.grad(total, (branch, residual), allow_unused=True) if isinstance(total, torch.Tensor) else ()
    return values, list(grads)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_values_and_gradients_are_those_of_tensors(use: Use, state: str) -> None:
    check_use(use, state, lazy_sum)


def check_use(use: Use, state: str, lazies: ModuleType) -> None:
    """Values to the bit; gradients but for the order in which autograd adds them up, in float64."""
    (mine, my_grads), (expected, grads) = (
        outcome(use, state, lazies.LazySum),
        outcome(use, state, lambda branch: branch),
    )
    mine = [lazies.tensor(value) for value in mine]
    for got, value in zip(mine, expected, strict=True):
        if isinstance(value, torch.Tensor):
            assert type(got) is torch.Tensor
            assert (got.dtype, got.shape) == (value.dtype, value.shape)
            assert torch.equal(got, value)
        else:
            assert got == value
    torch.testing.assert_close(my_grads, grads)


@pytest.mark.parametrize("unknown", ["no_such_thing", "__array_interface__", "__cuda_array_interface__"])
def test_unknown_attributes(unknown: str) -> None:
    with pytest.raises(AttributeError, match=unknown):
        getattr(LazySum(torch.ones(2, 2)), unknown)


def test_a_sum_waits_and_is_computed_once() -> None:
    branch, residual = leaves()
    h = residual + LazySum(branch) * 0.5
    assert h.parts is not None
    assert (h.parts[0] is branch, h.parts[1] is residual, h.parts[2]) == (True, True, 0.5)
    assert (h.shape, h.dtype, h.dim(), repr(h)) == (
        branch.shape,
        branch.dtype,
        3,
        f"LazySum(shape={ROWS}, dtype=torch.float64)",
    )
    assert h.parts is not None
    assert h.tensor is h.tensor
    assert h.parts is None


def test_the_wider_of_two_dtypes_is_the_residual() -> None:
    narrow, wide = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    for h in (LazySum(wide) + narrow, LazySum(narrow) + wide, wide + LazySum(narrow)):
        assert h.dtype is torch.float32
        assert [part.dtype for part in h.parts[:2]] == [torch.bfloat16, torch.float32]


def test_only_plain_floating_rows_with_a_graph_become_lazy() -> None:
    plain = torch.ones(2, 2)
    assert type(lazy(plain)) is LazySum
    for other in (torch.ones(2), torch.ones(2, 2, dtype=torch.long), nn.Parameter(plain), None, 3, (plain,)):
        assert lazy(other) is other
    with torch.no_grad():
        assert lazy(plain) is plain
        assert type(LazySum(plain) + plain) is torch.Tensor


def test_a_sum_made_with_a_graph_keeps_it_where_it_is_read_without() -> None:
    branch, residual = leaves()
    h = residual + LazySum(branch)
    with torch.no_grad():
        assert h.tensor.requires_grad
        assert not (h * 2).requires_grad
        assert not h.sum().requires_grad


def test_tensors_takes_lazy_sums_out_of_everything_and_keeps_the_containers() -> None:
    class Output(dict):  # type: ignore[type-arg]
        """A dict of somebody's own, as transformers has them."""

    one = torch.ones(2, 2)
    output = Output(h=LazySum(one), rest=[LazySum(one), (LazySum(one), 3)])
    assert tensors(output) is output
    assert output["h"] is one
    assert output["rest"][0] is one
    assert output["rest"][1] == (one, 3) or output["rest"][1][0] is one
    assert tensors((LazySum(one), None))[0] is one
    assert tensors("text") == "text"


LAZY = "patches/lazy_sum.py"
RESIDUAL = "patches/residual.py"

MUTANTS = (
    Mutant(LAZY, "self._residual + scaled\n", "scaled\n", "the residual is forgotten where no norm takes the sum"),
    Mutant(LAZY, "else self._branch * self._scale", "else self._branch", "the scale is forgotten"),
    Mutant(
        LAZY,
        "return LazySum(self._branch, residual, self._scale)",
        "return LazySum(self._branch, residual)",
        "unscaled",
    ),
    Mutant(LAZY, "if alpha != 1 or not", "if not", "the factor of a sum is forgotten"),
    Mutant(LAZY, "if p == 0.0 or not training:", "if True:", "dropout that is on is skipped"),
    Mutant(LAZY, "return LazySum(self.tensor, None, float(other))", "return self", "products are forgotten"),
    Mutant(LAZY, "or self._region != region()", "", "a sum from outside of a checkpoint is fused inside of it"),
    Mutant(
        LAZY,
        "if self._branch is not None and self._versions != _versions(",
        "if False and (",
        "stale sums go unnoticed",
    ),
    Mutant(LAZY, "and not torch.is_grad_enabled() and _inside_a_function()", "and False", "lost graphs go unnoticed"),
    Mutant(RESIDUAL, "if not torch.is_grad_enabled():\n", "if False:\n", "fused where no graph is recorded"),
    Mutant(RESIDUAL, "args[0].settle(h)", "args[0].settle(h.detach())", "the sum goes on without its graph"),
    Mutant(RESIDUAL, "args[0].settle(h)", "args[0].settle(y)", "the norm goes on in place of the sum"),
    Mutant(RESIDUAL, "branch, residual, scale = parts\n", "branch, residual, scale = *parts[:2], 1.0\n", "scale lost"),
    Mutant(
        RESIDUAL,
        "return tensors(original(self, *args, **kwargs))",
        "return original(self, *args, **kwargs)",
        "lazy sums leave",
    ),
    Mutant(RESIDUAL, "return has_hooks(norm) or", "return", "hooks of a norm are skipped"),
    Mutant(RESIDUAL, 'or "forward" in vars(norm)', "", "a forward set on the norm is skipped"),
    Mutant(RESIDUAL, "setattr(child, FLAG, None)", "pass", "branches stay lazy after their layer"),
    Mutant(
        RESIDUAL,
        "if not self.training or not torch.is_grad_enabled()",
        "if not torch.is_grad_enabled()",
        "lazy in evaluation",
    ),
    Mutant(
        RESIDUAL, "original(self, *map(tensor, args),", "original(self, *args,", "a branch and its hooks get lazy sums"
    ),
)


@contextmanager
def mutated(mutant: Mutant, folder: Path) -> Iterator[ModuleType]:
    """The residual patch with the mutant in it."""
    sources = {LAZY: Path(lazy_sum.__file__), RESIDUAL: Path(wiring.ResidualPatch.__module__.replace(".", "/") + ".py")}
    sources[RESIDUAL] = sources[LAZY].with_name("residual.py")
    loaded: dict[str, ModuleType] = {}
    with pytest.MonkeyPatch.context() as patch:
        for file, path in sources.items():
            source = path.read_text()
            if file == mutant.file:
                assert source.count(mutant.old) == 1, (
                    f"{mutant.old!r} stands {source.count(mutant.old)} times in {file}"
                )
                source = source.replace(mutant.old, mutant.new)
            (folder / path.name).write_text(source)
            name = f"automodel_accel.patches.{path.stem}"
            spec = importlib.util.spec_from_file_location(name, folder / path.name)
            assert spec is not None
            assert spec.loader is not None
            loaded[file] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, loaded[file])
            spec.loader.exec_module(loaded[file])
        patch.setattr(api, "all_patches", lambda: (loaded[RESIDUAL].ResidualPatch(),))
        patch.setattr(wiring, "LazySum", loaded[LAZY].LazySum)
        yield loaded[LAZY]


def check_layers() -> None:
    """What a mutant must not survive; errors of the product count as noticed, wrong numbers do not."""
    for layer, count in FUSED.items():
        ours, theirs = wiring.pair(layer)
        assert_close(wiring.run(ours, wiring.rows()), wiring.run(theirs, wiring.rows()))
        assert wiring.fused(ours) == 2 * count, layer
    wiring.test_evaluation_and_no_grad_are_bit_equal(Layer)
    wiring.test_hooks_see_tensors_and_what_they_return_counts(Layer, ("attention", "mlp", "norm2"))
    wiring.test_a_forward_set_on_the_norm_after_apply_runs()
    wiring.test_branches_called_outside_of_their_layer_return_tensors()
    for case in ((wiring.OwnFunction, "custom autograd"), (wiring.Stale, "written to in place")):
        try:
            wiring.test_what_cannot_be_right_is_an_error_and_not_a_wrong_gradient(*case)
        except pytest.fail.Exception as error:
            raise AssertionError(str(error)) from error


def check_everything(lazies: ModuleType) -> None:
    """All that catches mutants, the cheap first."""
    check_uses(lazies)
    check_layers()


def check_uses(lazies: ModuleType) -> None:
    for use in USES.values():
        for state in STATES:
            check_use(use, state, lazies)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    noticed = (AssertionError, torch.utils.checkpoint.CheckpointError)
    with mutated(mutant, tmp_path) as lazies, pytest.raises(noticed):
        check_everything(lazies)


def test_an_unchanged_copy_passes_what_catches_mutants(tmp_path: Path) -> None:
    with mutated(Mutant(LAZY, "import math\n", "import math\n", "no mistake"), tmp_path) as lazies:
        check_everything(lazies)
