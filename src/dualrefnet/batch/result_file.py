"""The table of a long prediction: rows are added as they come, a killed process loses the last of them, and the next one goes on.

The rows are in a neighbour with the suffix `.partial`, and what they were made of in `.partial.json` beside it. When all are there,
the neighbour is renamed.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dualrefnet.errors import DataError
from dualrefnet.files import read_json, write_json

# Seconds after which rows are on the disk even if the machine loses its power.
SYNC_AFTER = 5.0


def csv_lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows as CSV; names that aren't UTF-8 are written with escapes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", errors="backslashreplace")


class ResultFile:
    """A CSV whose rows come in order, in batches of a fixed size; use it as a context.

    Rows are kept in whole batches only: what a model says of a photograph may differ in the last digit with the photographs beside it,
    and a result that was interrupted shall be the same to the byte as one that wasn't.

    Attributes:
        out: the file, once it is finished.
        partial: where the rows are until then.
        kept: rows of an earlier process that stay.
        failed: rows, of all that are there, whose last column (`error`) isn't empty.
    """

    def __init__(self, out: Path, columns: Sequence[str], made_of: Mapping[str, Any], total: int, batch: int, resume: bool) -> None:
        """Begin, or go on.

        Args:
            out: the file to write.
            columns: its header; the last column is `error`.
            made_of: what the rows depend on, for JSON; a file that was made of something else isn't gone on with.
            total: rows when it is finished.
            batch: rows in a batch.
            resume: go on with what an earlier process left; begin if it left nothing.

        Raises:
            DataError: an earlier process left rows and `resume` is False, they were made of something else, another process is
                writing, or there is nothing to go on with but a finished file.
        """
        self.out, self.total, self.batch = out, total, batch
        self.partial = out.with_name(f"{out.name}.partial")
        self._description = out.with_name(f"{out.name}.partial.json")
        self._header = csv_lines([columns])
        self.kept = self.failed = 0
        made_of = {**made_of, "rows": total, "batch": batch}
        if out.is_dir():
            raise DataError(f"{out} is a folder; name a file, such as {out / 'predictions.csv'}")
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists() and not resume:
            raise DataError(
                f"{self.partial} is what an unfinished prediction left: --resume goes on with it; to begin anew, remove it and "
                f"{self._description}"
            )
        if self.partial.exists():
            self._compare(made_of)
        elif resume and out.exists():
            raise DataError(f"{out} is finished and nothing is left to resume; without --resume it is made again")
        else:
            write_json(self._description, made_of)
        self._file = self._locked()
        try:
            self._keep_whole_batches()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What couldn't be written for want of space can't be flushed either.
        with suppress(OSError):
            self._file.close()

    def append(self, lines: bytes, failed: int) -> None:
        """Add the rows of one batch, made by `csv_lines`; `failed` of them hold an error.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._file.write(lines)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_AFTER:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise self._in_words(error) from error
        self.failed += failed

    def finish(self) -> None:
        """Give the file its name, once all rows are there."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._in_words(error) from error
        os.replace(self.partial, self.out)
        self._description.unlink(missing_ok=True)

    def _compare(self, made_of: Mapping[str, Any]) -> None:
        if not self._description.is_file():
            raise DataError(
                f"{self._description} is missing, so it isn't known what {self.partial} was made of; remove that and begin anew"
            )
        before = read_json(self._description)
        changed = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
        if changed:
            raise DataError(
                f"{self.partial} can't be resumed, since this has changed: {', '.join(changed)}; call as before, or remove it and "
                f"{self._description} to begin anew"
            )

    def _locked(self) -> BinaryIO:
        file = self.partial.open("r+b" if self.partial.exists() else "x+b")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; there the user must see to it.
            pass
        except OSError as error:
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(f"another process is writing {self.partial}; wait for it, or choose another --out") from None
        return file

    def _keep_whole_batches(self) -> None:
        """Find the end of the last whole batch, cut off what comes after it, and count the rows before it."""
        end, rows, errors, quotes = len(self._header), 0, 0, 0
        header = self._file.readline()
        if header != self._header:
            # Killed before the first row was written.
            end = 0
        else:
            position = end
            for line in self._file:
                position += len(line)
                quotes += line.count(b'"')
                if quotes % 2 or not line.endswith(b"\n"):
                    # Inside a quoted cell, or cut short.
                    continue
                rows += 1
                errors += not line.endswith(b",\n")
                if rows % self.batch == 0 or rows == self.total:
                    end, self.kept, self.failed = position, rows, errors
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(self._header)
            self._file.flush()

    def _in_words(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(f"the disk is full; what is done is kept in {self.partial}: free some space and run again with --resume")
        return error
