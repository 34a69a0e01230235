"""Which evaluation was the best, and when to stop waiting for a better one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Selection:
    """The best mean Dice of the validation split so far."""

    patience: int
    """Evaluations without a better one that end the run; 0: none do."""
    best: float = -1.0
    """Its mean Dice; -1 before the first evaluation."""
    since: int = 0
    """Evaluations after it."""

    def better(self, mean_dice: float) -> bool:
        """Take in one evaluation; returns whether it is the best so far."""
        if mean_dice > self.best:
            self.best, self.since = mean_dice, 0
            return True
        self.since += 1
        return False

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.since
