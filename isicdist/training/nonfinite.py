"""Steps whose loss or gradient is not finite: their update is left out, and a run of them ends the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isicdist.errors import TrainingError

NAMED = 8
"""Sample keys that the message names; the batch may hold thousands."""


class NonFiniteGuard:
    """Leaves out updates on the device, without waiting for it.

    Loss and gradient are those of the whole step, so every rank comes to the same answer and nothing is exchanged.
    """

    def __init__(
        self,
        adam: torch.optim.Adam,
        *,
        limit: int,
        scaled: bool,
        keys_at: Callable[[dict[str, int]], Sequence[str]],
    ) -> None:
        """`adam`: fused, so that it obeys `found_inf` as `torch.amp.GradScaler` uses it: weights and moments stay.

        `limit`: updates left out in a row that are borne. `scaled`: whether the loss is scaled (fp16); then a
        gradient that overflows is the scaler's business, and no failure. `keys_at`: the keys of the samples of the
        step that begins at a position of the stream.
        """
        self._adam, self._limit, self._scaled, self._keys_at = adam, limit, scaled, keys_at
        device = adam.param_groups[0]["params"][0].device
        self._row = torch.zeros((), dtype=torch.int64, device=device)  # bad steps in a row, up to the last one
        self._last: tuple[int, dict[str, int]] = (0, {})

    def judge(self, step: int, position: dict[str, int], loss: Tensor, norm: Tensor) -> Tensor:
        """Whether `step` (from 1) is bad, bool on the device; if so, the optimizer's next `step()` changes nothing.

        `position`: of the stream before the step. `loss` and `norm` are scalars: the loss of the step, and the norm
        of its gradient. Raises TrainingError on every rank if the steps before it were too many bad ones: it is
        asked for one step late, when the device has the answer.
        """
        if int(self._row) > self._limit:
            raise self._given_up()
        bad = ~loss.isfinite() if self._scaled else ~(loss.isfinite() & norm.isfinite())
        self._adam.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._row, self._last = (self._row + 1) * bad, (step, position)
        return bad

    def _given_up(self) -> TrainingError:
        step, position = self._last
        keys = self._keys_at(position)
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        return TrainingError(
            f"loss or gradient not finite in {int(self._row)} steps in a row, the last one step {step} with samples "
            f"{', '.join(keys[:NAMED])}{more}; none of them changed a weight, and the last checkpoint stands: go on "
            "from it with a lower --optim.lr, or with --mixed_precision bf16 or no"
        )
