"""Low-rank adapters by torch's operations: any device, any dtype.

Shapes: x is [N, H]; A [R, H]; B [F, R]; p and its gradient [N, R]; the gradient of an output [N, F]. A list has one entry for
each linear of one input, None where it has no adapter. All tensors of a call are of one dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from automodel_accel.kernels.lora import Form, Forms, Tensors, draw_mask, generator_at, generator_state

States = Mapping[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Projected:
    """[N, R] for several adapters, by their number.

    Attributes:
        plain: Those without dropout, which share GEMMs: their numbers, and the ranks.
        plain_NR: Theirs side by side; None where there are none.
        others: The other ones.
    """

    plain: dict[int, int]
    plain_NR: torch.Tensor | None
    others: dict[int, torch.Tensor]

    def each(self) -> dict[int, torch.Tensor]:
        """Of each adapter; of those without dropout, columns."""
        if self.plain_NR is None:
            return self.others
        return {**_by_number(self.plain, self.plain_NR, 1), **self.others}


def dropped(x: torch.Tensor, form: Form, state: torch.Tensor) -> torch.Tensor:
    """m * x, in new memory, by the mask that was drawn when the generator was in `state`."""
    with generator_at(state, x.device):
        return draw_mask(x, form.dropout).mul_(x)


def project(x_NH: torch.Tensor, a: Tensors, forms: Forms) -> tuple[dict[int, torch.Tensor], States]:
    """p of each adapter, and where there is dropout the state that its mask was drawn from."""
    plain = {i: a[i].shape[0] for i, form in enumerate(forms) if form is not None and not form.dropout}  # type: ignore[union-attr]
    plain_NR = x_NH @ _stacked(a, plain).t() if plain else None
    others, states = {}, {}
    for i, (form, a_RH) in enumerate(zip(forms, a, strict=True)):
        if form is not None and a_RH is not None and i not in plain:
            states[i] = generator_state(x_NH.device)
            others[i] = draw_mask(x_NH, form.dropout).mul_(x_NH) @ a_RH.t()
    return Projected(plain, plain_NR, others).each(), states


def product(p_NR: torch.Tensor, b_FR: torch.Tensor, bias: torch.Tensor | None, form: Form) -> torch.Tensor:
    """f p B^T + bias, in new memory."""
    start = p_NR.new_empty(()) if bias is None else bias
    return torch.addmm(start, p_NR, b_FR.t(), beta=0 if bias is None else 1, alpha=form.factor)


def grad_projected(grad_outputs: Mapping[int, torch.Tensor], b: Tensors, forms: Forms) -> Projected:
    """dp of each adapter whose output has a gradient."""
    plain: dict[int, int] = {}
    others: dict[int, torch.Tensor] = {}
    for i, grad in grad_outputs.items():
        b_FR, form = b[i], forms[i]
        if b_FR is not None and form is not None and form.dropout:
            others[i] = torch.addmm(grad.new_empty(()), grad, b_FR, beta=0, alpha=form.factor)
        elif b_FR is not None:
            plain[i] = b_FR.shape[1]
    if not plain:
        return Projected(plain, None, others)
    any_grad = grad_outputs[next(iter(plain))]
    plain_NR = any_grad.new_empty(any_grad.shape[0], sum(plain.values()))
    for i, out in _by_number(plain, plain_NR, 1).items():
        torch.addmm(out, grad_outputs[i], b[i], beta=0, alpha=forms[i].factor, out=out)  # type: ignore[union-attr,arg-type]
    return Projected(plain, plain_NR, others)


def grad_a(grads: Projected, x_NH: torch.Tensor, forms: Forms, states: States) -> dict[int, torch.Tensor]:
    """dA [R, H] of each adapter in `grads`."""
    found = {i: grad.t() @ dropped(x_NH, forms[i], states[i]) for i, grad in grads.others.items()}  # type: ignore[arg-type]
    if grads.plain_NR is not None:
        found.update(_by_number(grads.plain, grads.plain_NR.t() @ x_NH, 0))
    return found


def grad_b(grad_output_NF: torch.Tensor, p_NR: torch.Tensor, form: Form) -> torch.Tensor:
    """dB [F, R]."""
    return torch.addmm(p_NR.new_empty(()), grad_output_NF.t(), p_NR, beta=0, alpha=form.factor)


def grad_input(grads: Projected, a: Tensors, forms: Forms, states: States) -> torch.Tensor | None:
    """The adapters' part of dx [N, H], in new memory; None where none of them has a gradient."""
    parts = [dropped(grad @ a[i], forms[i], states[i]) for i, grad in grads.others.items()]  # type: ignore[arg-type,operator]
    if grads.plain_NR is not None:
        parts.append(grads.plain_NR @ _stacked(a, grads.plain))
    if not parts:
        return None
    first, *rest = parts
    for part in rest:
        first += part
    return first


def _by_number(ranks: Mapping[int, int], joined: torch.Tensor, axis: int) -> dict[int, torch.Tensor]:
    return dict(zip(ranks, torch.split(joined, list(ranks.values()), axis), strict=True))


def _stacked(a: Tensors, numbers: Mapping[int, int]) -> torch.Tensor:
    """Several A in one [sum of R, H]; the one itself where it is alone."""
    chosen = [a[i] for i in numbers]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)  # type: ignore[arg-type,return-value]
