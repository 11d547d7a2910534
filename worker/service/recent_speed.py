"""Speed of a worker over the last seconds, for its status: tokens/s and quantiles of TTFT.

`/metrics` has the same since the start, as counters and histograms; `reporter.py` publishes these
to viewers that read the registry alone.
"""

import math
import time
from collections import deque
from collections.abc import Sequence

RATE_S = 10.0
"""Window of the rate of tokens."""
_BUCKET_S = 0.5
TTFT_S = 300.0
"""Window of the times to first token."""
TTFT_VALUES = 512
"""Most values in that window; the newest ones count."""


class RecentSpeed:
    """Counts of one worker's tokens and times to first token. Times in seconds, monotonic."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._buckets: deque[tuple[int, int]] = deque()
        """Numbers of buckets of `_BUCKET_S`, each with its tokens."""
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=TTFT_VALUES)
        """When each first token came, and after how long."""

    def count_tokens(self, tokens: int) -> None:
        """Count tokens that have just been drawn."""
        bucket = int(time.monotonic() / _BUCKET_S)
        if self._buckets and self._buckets[-1][0] == bucket:
            tokens += self._buckets.pop()[1]
        self._buckets.append((bucket, tokens))
        while self._buckets[0][0] < bucket - RATE_S / _BUCKET_S:
            self._buckets.popleft()

    def first_token(self, ttft_s: float) -> None:
        """Record the time from a claim to the first token, which has just been drawn."""
        self._first_tokens.append((time.monotonic(), ttft_s))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all jobs per second of the last `RATE_S`."""
        now_s = time.monotonic()
        oldest = now_s / _BUCKET_S - RATE_S / _BUCKET_S
        tokens = sum(count for bucket, count in self._buckets if bucket >= oldest)
        return tokens / min(RATE_S, max(_BUCKET_S, now_s - self._began_s))

    def ttft_quantiles(self, *shares: float) -> list[float] | None:
        """Quantiles of the recent times to first token, by nearest rank; None without a value."""
        since_s = time.monotonic() - TTFT_S
        values = sorted(ttft_s for at_s, ttft_s in self._first_tokens if at_s >= since_s)
        return [_quantile(values, share) for share in shares] if values else None


def _quantile(values: Sequence[float], share: float) -> float:
    return values[max(0, math.ceil(share * len(values)) - 1)]
