"""What every command does alike: how it fails, and how it prints numbers and tables."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from efficient.errors import UserError

Params = ParamSpec("Params")
Result = TypeVar("Result")
# What a disk or a path may answer to any command; other errors of the system are ours to explain.
DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE),
)


def one_line(error: BaseException) -> str | None:
    """What to tell the user of an error that is not the project's; None where it is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return f"{what}; give a path that can be written, or make room"
    return None


def main_guard(fn: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorates the `main` of a command.

    A `UserError` becomes one line, `error: ...`, on stderr and exit status 2, and so does a path
    that cannot be written or a disk that is full; Ctrl-C exits with
    status 130 and a closed pipe (`... | head`) with 141, all without a traceback. Any other
    exception is a bug of the project and keeps its traceback. `SystemExit` is raised rather than
    a status returned, so the exit status holds under `absl.app.run` and a bare `main()` too.
    """

    @functools.wraps(fn)
    def guarded(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return fn(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        except BrokenPipeError:
            # Python flushes stdout once more at exit; send that nowhere instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (UserError, OSError) as error:
            if (line := one_line(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    return guarded


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligned plain-text columns, readable in a terminal, in a log file and by `grep`.

    Args:
      header: the column names.
      rows: the cells, as many to a row as `header` has.
      right: names of the right-aligned columns (numbers), separated by commas.
    """
    numbers = {name.strip() for name in right.split(",")}
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def human(number: float) -> str:
    """Three significant digits and a suffix: 512, 42.1k, 1.50M."""
    for suffix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or suffix == "E":
            break
        number /= 1000
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    if not suffix and number == int(number):
        digits = 0
    return f"{number:.{digits}f}{suffix}"


def duration(seconds: float) -> str:
    """0:09, 1:12, 2:03:04 or 3d 04:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
