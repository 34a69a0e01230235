"""Non-finite steps (NaN or infinite loss or gradient): skip their update, and end a run that only has such steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isicdist.data.stream import StreamState
from isicdist.errors import TrainingError

NAMED_SAMPLES = 8
"""Sample names in the message; the batch may hold thousands."""


class NonFiniteGuard:
    """Skips non-finite updates without a sync on the current step: the count is read one step late.

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

        `limit`: maximum number of consecutive skipped updates. `scaled`: the loss is scaled (fp16); then a gradient
        that overflows is the scaler's business, and no failure. `sample_names`: of the step that begins at a position
        of the stream.
        """
        self._adam, self._limit, self._scaled, self._sample_names = adam, limit, scaled, sample_names
        device = adam.param_groups[0]["params"][0].device
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._last: tuple[int, StreamState] | None = None

    def check(self, step: int, position: StreamState, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide about the update of `step` (from 1): a bool on the device, True when `adam.step()` will skip it.

        `position`: of the stream before the step. `loss` and `norm` are scalars: the loss of the step, and the norm
        of its gradient. Raises TrainingError on every rank when too many steps before it were skipped in a row.
        """
        if self._last and int(self._in_a_row) > self._limit:
            raise self._too_many(*self._last)
        skipped = ~loss.isfinite() if self._scaled else ~(loss.isfinite() & norm.isfinite())
        self._adam.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._in_a_row, self._last = (self._in_a_row + 1) * skipped, (step, position)
        return skipped

    def _too_many(self, step: int, position: StreamState) -> TrainingError:
        names = self._sample_names(position)
        more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
        return TrainingError(
            f"loss or gradient not finite in {int(self._in_a_row)} steps in a row, the last one step {step} with "
            f"samples {', '.join(names[:NAMED_SAMPLES])}{more}; none of them changed a weight, and the last checkpoint "
            "stands: go on from it with a lower --optim.lr, or with --mixed_precision bf16 or no"
        )
