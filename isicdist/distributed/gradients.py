"""Gradient all-reduce: one sum over all ranks per step, after the last micro batch.

DDP would sum inside the last backward pass. There, a rank that runs out of memory leaves the others waiting for ever;
here every micro batch is a rank's own business, and the ranks agree (`isicdist.distributed.agree.AnyRank`) before they
exchange anything. The cost is the overlap of the sum with the backward pass: with the 3.2 million weights of this
network, one all-reduce of 13 MB per step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Gradients:
    """The gradients of all parameters as one flat tensor, with the loss of the step as its last element."""

    def __init__(self, parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
        """Make the flat tensor for `parameters`, which have one dtype and are on their device."""
        self._parameters = parameters = list(parameters)
        self._accelerator = accelerator
        self._distributed, self._scaled = accelerator.num_processes > 1, accelerator.scaler is not None
        ends = list(itertools.accumulate(p.numel() for p in parameters))
        self._flat = parameters[0].new_zeros(ends[-1] + 1)  # (weights + 1,)
        self._views = [
            torch.as_strided(self._flat, p.shape, p.stride(), end - p.numel())
            for p, end in zip(parameters, ends, strict=True)
        ]
        self.zero()

    def add_micro_batch(self, loss: Tensor) -> None:
        """Add the gradient of one micro batch, which `backward` has left in `grad`, and its share of the loss.

        One kernel for all parameters, where autograd would launch one for each. `grad` is None again: under CUDA graphs
        it is the graph's memory, which the next replay writes over.
        """
        computed = [(view, p.grad) for view, p in zip(self._views, self._parameters, strict=True) if p.grad is not None]
        if computed:
            views, gradients = zip(*computed, strict=True)
            add = torch._foreach_copy_ if self._empty else torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage, reportUnknownMemberType]
            add(views, gradients)
            self._empty = False
        for p in self._parameters:
            p.grad = None
        self._flat[-1] += loss.detach()

    def all_reduce(self) -> Tensor:
        """Sum gradients and loss over all ranks; returns the loss of the whole step. Every rank calls it.

        From here on the `grad` of each parameter is a view of the flat tensor.

        Where the loss is scaled (fp16), a loss that is not finite makes the gradient so, too: the scaler looks at
        gradients only, and would make the update. NaN or infinity times 0 is NaN.
        """
        for p, view in zip(self._parameters, self._views, strict=True):
            p.grad = view
        if self._distributed:
            torch.distributed.all_reduce(self._flat)
        loss = self._flat[-1].clone()
        if self._scaled:
            self._flat += loss * 0
        return loss

    def clip(self, max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        """Unscale the gradient (fp16) and clip its norm to `max_norm` (0: no limit); returns the norm before."""
        self._accelerator.unscale_gradients(optimizer)
        gradient = self._flat[:-1]
        norm = torch.linalg.vector_norm(gradient)
        if max_norm:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def zero(self) -> None:
        """Forget gradients and loss."""
        self._flat.zero_()
        self._empty = True
        for p in self._parameters:
            p.grad = None
