"""What a batch costs in seconds on this device, learned from the batches that ran."""

from __future__ import annotations

SMOOTHING = 0.1


class PriceList:
    """Seconds of a batch: a constant, plus multiply-adds over a rate. Both follow what is measured.

    Args:
        seconds_per_mac: first guess.
        overhead: first guess of the seconds that any batch takes.
    """

    def __init__(self, seconds_per_mac: float = 2e-11, overhead: float = 1e-3) -> None:
        self.seconds_per_mac = seconds_per_mac
        self.overhead = overhead

    def seconds(self, macs: int) -> float:
        """Return the share of an item of `macs` multiply-adds in a batch's time.

        Without the constant.
        """
        return macs * self.seconds_per_mac

    def observe(self, macs: int, seconds: float) -> None:
        """Learn from a batch of `macs` multiply-adds that took `seconds`.

        Batches too small to show the rate correct the constant, the others the rate.
        """
        if self.seconds(macs) < self.overhead:
            seen = max(seconds - self.seconds(macs), 0.0)
            self.overhead += SMOOTHING * (seen - self.overhead)
        else:
            rate = max(seconds - self.overhead, 0.1 * seconds) / macs
            self.seconds_per_mac += SMOOTHING * (rate - self.seconds_per_mac)
