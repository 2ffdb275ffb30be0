"""How much to work on at a time."""

import torch

# Values in a chunk. On a CPU 8 MiB of float32, which stay in the cache and whose memory is reused, not mapped afresh;
# elsewhere only large enough that launches do not count.
_ON_CPU = 1 << 21
_ELSEWHERE = 1 << 26


def chunk_rows(width: int, device: torch.device) -> int:
    """Rows of ``width`` values that make a chunk, at least one."""
    return max(1, (_ON_CPU if device.type == "cpu" else _ELSEWHERE) // max(1, width))
