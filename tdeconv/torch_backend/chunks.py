"""How much to work on at a time, so that it stays in the cache and its memory is reused instead of mapped afresh."""

# Values in a chunk: 8 MiB of float32.
_VALUES = 1 << 21


def chunk_rows(width: int) -> int:
    """Rows of ``width`` values that make a chunk, at least one."""
    return max(1, _VALUES // max(1, width))
