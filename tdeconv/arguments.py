"""The commands' arguments: their types, and what can be refused of them before anything is done."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

_PROBE = 1 << 20  # bytes: as much as results take


def positive_int(text: str) -> int:
    """A whole number from 1 on, for ``add_argument(type=...)``.

    Raises:
        argparse.ArgumentTypeError: it is below 1, or no whole number.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def nonempty_path(text: str) -> Path:
    """A path, for ``add_argument(type=...)``. An empty one, as of a shell's unset variable, would mean the working
    directory.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def check_writable(folder: Path, argument: str = "--out") -> None:
    """Refuse a folder that results cannot be written to, before they are made. The folder is left as it was, or absent.

    Args:
        argument: what the error calls the folder.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    absent = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE))
    except OSError as error:
        raise ValueError(f"{argument} {folder} cannot be written to: {why(error)}; give another folder") from None
    finally:
        for one in absent:  # the innermost first
            with contextlib.suppress(OSError):
                one.rmdir()


def read(file: Path, argument: str) -> str:
    """The text of a file.

    Args:
        argument: what the error calls the file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{argument} {file} cannot be read: {why(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument} {file} is no text: {error}") from None


def why(error: OSError) -> str:
    """The reason alone, without the path: that of a temporary file would be no help."""
    return "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
