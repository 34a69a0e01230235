"""Non-finite steps (NaN or infinite loss or gradient): skip their update, and end a run that only has such steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isicdist.data.stream import StreamState
from isicdist.errors import TrainingError

NAMED_SAMPLES = 8
"""Sample names in the message; the batch may hold thousands."""
OVERFLOWS = 30
"""Further skipped steps in a row for the gradient scaler (fp16) to find its scale: each halves it, 65,536 to 6e-5."""


class NonFiniteGuard:
    """Skips non-finite updates without a sync on the current step: the counts are read one step late.

    Loss and gradient are those of the whole step, so every rank comes to the same decision and nothing is exchanged.
    """

    def __init__(
        self,
        adam: torch.optim.Adam,
        *,
        limit: int,
        scaled: bool,
        sample_names: Callable[[StreamState], Sequence[str]],
    ) -> None:
        """Guard the updates of `adam`, fused, so that it obeys `found_inf`: weights and moments stay as they are.

        `limit`: maximum number of consecutive skipped updates. `scaled`: the loss is scaled (fp16). Then the scaler
        skips what is not finite (a bad loss has spoiled the gradient, see `Gradients.all_reduce`), and up to OVERFLOWS
        more steps in a row may overflow. `sample_names`: of the step that begins at a position of the stream.
        """
        self._adam, self._limit, self._scaled, self._sample_names = adam, limit, scaled, sample_names
        device = adam.param_groups[0]["params"][0].device
        self._in_a_row = torch.zeros(2, dtype=torch.int64, device=device)  # steps of a bad loss; all skipped steps
        on_gpu = device.type == "cuda"
        self._seen = torch.zeros(2, dtype=torch.int64, pin_memory=on_gpu)  # the same on the host, one step late
        self._copied = torch.cuda.Event() if on_gpu else None
        self._last: tuple[int, StreamState] | None = None

    def check(self, step: int, position: StreamState, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide about the update of `step` (from 1): a bool on the device, True when it will be skipped.

        `position`: of the stream before the step. `loss` and `norm` are scalars: the loss of the step, and the norm
        of its gradient. Raises TrainingError on every rank when too many steps before it were skipped in a row.
        """
        self._raise_if_too_many()
        bad_loss = ~loss.isfinite()
        skipped = bad_loss | ~norm.isfinite()
        if not self._scaled:
            bad_loss = skipped
            self._adam.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._in_a_row = (self._in_a_row + 1) * torch.stack([bad_loss, skipped])
        self._seen.copy_(self._in_a_row, non_blocking=True)
        if self._copied:
            self._copied.record()
        self._last = step, position
        return skipped

    def _raise_if_too_many(self) -> None:
        if self._last is None:
            return
        if self._copied:
            self._copied.synchronize()  # of the copy alone, a step ago: what is queued since goes on
        bad_losses, skipped = self._seen.tolist()
        if bad_losses <= self._limit and skipped <= self._limit + OVERFLOWS:
            return
        step, position = self._last
        names = self._sample_names(position)
        more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
        raise TrainingError(
            f"loss or gradient not finite in {max(bad_losses, skipped)} steps in a row, the last one step {step} with "
            f"samples {', '.join(names[:NAMED_SAMPLES])}{more}; none of them changed a weight, and the last checkpoint "
            "stands: go on from it with a lower --optim.lr, or with --mixed_precision bf16 or no"
        )
