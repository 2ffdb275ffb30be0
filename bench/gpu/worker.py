"""A child process that works through units, watched: a unit that crashes or hangs costs itself alone.

The child appends lines of JSON to a file: ``{"begin": unit}``, rows of results, ``{"done": unit}``, and at its very end
``{"end": true}``. When it dies or is stopped, it is started again, and passes over the units that its file has begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]
DYING = 20  # seconds
TAIL = 600  # characters of a dead child's last words


def begun(path: Path) -> set[str]:
    """The units that a file of rows has begun."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return {record["begin"] for line in lines if "begin" in (record := _record(line))}


def _record(line: bytes) -> Row:
    """Empty for what a child did not live to finish writing."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def write(file: TextIO, record: Row) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def tail(path: Path) -> str:
    """The last words in a log, without blank lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(line for line in text.splitlines() if line.strip())[-TAIL:]


class Worker:
    """One child, from its start to its end however often it has to be started.

    Attributes:
        finished: there is nothing more to wait for.
        failed: why it was given up, or empty.
        counts: units begun, and rows with an error.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], rows: Path, cwd: Path, unit_seconds: float):
        self.command, self.env, self.rows, self.cwd, self.unit_seconds = command, env, rows, cwd, unit_seconds
        self.log = rows.with_suffix(".log")
        self.finished, self.failed, self.running = False, "", ""
        self._read, self._begun_before, self.begun = 0, 0, 0
        self._start()

    def _start(self) -> None:
        self.since, self._begun_before, self._gone = time.monotonic(), self.begun, False
        with self.rows.open("ab") as file:  # a line that its writer did not finish ends here
            file.write(b"\n" * (file.tell() > 0))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--rows", str(self.rows)],
                env={**os.environ, **self.env},
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its own children can be stopped with it
            )

    def poll(self) -> list[Row]:
        """What is new. Takes care of a child that died or hangs."""
        if self.finished:
            return []
        code = self.process.poll()  # first, so that what it wrote at last is read
        rows = self._new_rows()
        if self.finished:
            self.kill()
        elif code is not None:
            rows += self._lost(f"the process ended with status {code}: {tail(self.log)}")
        elif time.monotonic() - self.since > self.unit_seconds:
            self.kill()
            rows += [*self._new_rows(), *self._lost(f"stopped: it took more than {self.unit_seconds:.0f} s")]
        return rows

    def stop(self) -> list[Row]:
        """The step's time is up."""
        if self.finished:
            return []
        self.kill()
        rows, self.finished = self._new_rows(), True
        return [*rows, *self._error("stopped: the step's time was up")]

    def kill(self) -> None:
        """The child and its children; once, since its number may be another's later."""
        if self._gone:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time
            self.process.wait(DYING)
        self._gone = True

    def _new_rows(self) -> list[Row]:
        if not self.rows.exists():
            return []
        with self.rows.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._read += len(complete)
        rows = []
        for line in complete.splitlines():
            record = _record(line)
            if "begin" in record:
                self.running, self.since, self.begun = record["begin"], time.monotonic(), self.begun + 1
            elif "done" in record:
                self.running, self.since = "", time.monotonic()
            elif "end" in record:
                self.finished = True
            elif record:
                rows.append(record)
        return rows

    def _error(self, why: str) -> list[Row]:
        row, self.running = {"unit": self.running, "error": why}, ""
        return [row] if row["unit"] else []

    def _lost(self, why: str) -> list[Row]:
        """The running unit failed; the rest is for a new child, unless none gets anywhere."""
        rows = self._error(why)
        if self.begun > self._begun_before:
            self._start()
        else:
            self.finished, self.failed = True, why
        return rows
