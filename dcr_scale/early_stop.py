"""When stage 1 has done its work, judged on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

from dcr_scale.config import StopConfig


class EarlyStop:
    """Stage 1 has done its work when held-out prompts of the two classes lie apart, or draw apart no further."""

    def __init__(self, config: StopConfig):
        self.config = config
        self.best = float("inf")
        self.looks_without_progress = 0

    def as_dict(self) -> dict[str, float]:
        """What it has seen so far, for a checkpoint."""
        return {"best": self.best, "looks_without_progress": self.looks_without_progress}

    def restore(self, seen: Mapping[str, float]) -> None:
        """Go on with what :meth:`as_dict` gave."""
        self.best, self.looks_without_progress = seen["best"], int(seen["looks_without_progress"])

    def reason(self, cross: float) -> str | None:
        """Why to stop after a look that found this cross-class cosine; None to go on."""
        target = self.config.cross_cosine
        if target is not None and cross <= target:
            return f"held-out cross-class cosine {cross:.3f} reached its target of {target}"
        if cross < self.best - self.config.min_delta:
            self.best = cross
            self.looks_without_progress = 0
            return None
        self.looks_without_progress += 1
        if self.config.patience and self.looks_without_progress >= self.config.patience:
            return (
                f"plateau: the held-out cross-class cosine has not fallen by {self.config.min_delta} in "
                f"{self.looks_without_progress} looks (now {cross:.3f})"
            )
        return None
