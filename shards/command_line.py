"""The shell of both command lines: `--debug`, one line on stderr for a failure, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from shards.errors import ToolkitError, UsageError

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as of a shell


def create_app(*, name: str, help: str, **options: Any) -> App:
    """Make a cyclopts app for `run_app`, with a `--debug` flag that every command takes. `options`: those of `App`."""
    # Ctrl-C reaches `_exit_code`, which explains it in one line.
    app = App(name=name, help=help, suppress_keyboard_interrupt=False, **options)

    @app.meta.default
    def launch(  # pyright: ignore[reportUnusedFunction]  registered by the decorator
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        debug: Annotated[bool, Parameter(negative="")] = False,
    ) -> int:
        """Run one command.

        Parameters
        ----------
        debug
            Show the traceback of a failure.
        """
        return _exit_code(lambda: _parse_and_run(app, tokens, name), debug=debug)

    return app


def run_app(app: App, arguments: Sequence[str]) -> NoReturn:
    """Run a command line and end the process with its exit code.

    0 when the command returns None, else what it returns; the `exit_code` of a ToolkitError (2 for bad usage); 1 for an
    operating-system error (a full disk, a read-only folder); 130 on Ctrl-C. A failure is one line on stderr, which
    begins with the rank if there are several processes; `--debug` prints the traceback before it.
    """
    sys.exit(_exit_code(lambda: _parse_and_run(app.meta, arguments, app.name[0]), debug=False))


def _parse_and_run(app: App, tokens: Sequence[str], program: str) -> int | None:
    """Run the command that `tokens` name. Raises UsageError when they do not parse."""
    try:
        return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        if isinstance(error.__cause__, ToolkitError):  # raised by a dataclass that checks its own fields
            raise error.__cause__ from None
        raise UsageError(f"{error} See {program} --help.") from error


def _exit_code(command: Callable[[], int | None], *, debug: bool) -> int:
    """Run `command`; turn an exception into one line on stderr and an exit code."""
    try:
        return command() or 0
    except ToolkitError as error:
        return _print_failure(error, str(error), error.exit_code, debug)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return _print_failure(error, f"{path}{error.strerror or error}", 1, debug)
    except KeyboardInterrupt as error:
        return _print_failure(error, "interrupted", INTERRUPTED, debug)


def _print_failure(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    rank = f"rank {os.environ['RANK']}: " if several else ""
    print(f"error: {' '.join(f'{rank}{message}'.split())}", file=sys.stderr)
    return code
