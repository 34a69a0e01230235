"""The shell around both command lines: how a command ends becomes an exit code and one line on stderr."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from shards.errors import ToolkitError


def exit_code_of(command: Callable[[], int | None], *, debug: bool, who: str = "") -> int:
    """Run `command` and turn how it ends into an exit code, with one line on stderr for a failure.

    `debug` shows the traceback, too. `who` stands before the line: which process speaks, where there are several.

    Returns 0 when the command returns None, else what it returns; a `ToolkitError`'s own code; 1 for an
    operating-system error (a full disk, a read-only folder), which names its file; 130 on Ctrl-C.
    """
    try:
        return command() or 0
    except ToolkitError as error:
        return _say(error, f"{who}{error}", error.exit_code, debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _say(error, f"{who}{place}{error.strerror or error}", 1, debug)
    except KeyboardInterrupt as error:
        return _say(error, f"{who}interrupted", 130, debug)


def _say(error: BaseException, line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code
