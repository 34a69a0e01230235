"""The shell of both command lines: `--debug`, one line on stderr for a failure, and the exit code."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, Any, NoReturn, get_args

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter

from shards.errors import ToolkitError, UsageError
from shards.urls import without_password

Config = Callable[[App, tuple[str, ...], ArgumentCollection], None]
"""Function of cyclopts that may check the arguments of a command, or add to them."""
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as of a shell
_SPELL_OUT = "isicdist.spell-out"  # an error handler of Python's encoders
_ASCII = {"×": "x", "µ": "u", "·": ",", "–": "-", "…": "...", "°": " degrees"}
REDRAWN_ROWS = 8
"""Maximum rows of a terminal that the live display of rank 0 redraws, from the cursor upwards: the error message of
another rank on the same terminal ends in as many empty lines, or it would be erased."""


def create_app(*, name: str, help: str, config: Sequence[Config] = (), **options: Any) -> App:
    """Make a cyclopts app for `run_app`, with a `--debug` flag that every command takes.

    `config`: functions that see the arguments before they are converted; `options`: others of `App`.
    """
    # Ctrl-C reaches `_exit_code`, which explains it in one line.
    app = App(name=name, help=help, suppress_keyboard_interrupt=False, config=(_check_integers, *config), **options)

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


def _check_integers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise UsageError for a fraction where a whole number is wanted: cyclopts would round it."""
    for argument in arguments:
        kinds = (argument.hint, *get_args(argument.hint))
        for token in argument.tokens if int in kinds and float not in kinds else []:
            if re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*", token.value):
                raise UsageError(f"{token.keyword} {token.value}: give a whole number")


def run_app(app: App, arguments: Sequence[str]) -> NoReturn:
    """Run a command line and end the process with its exit code.

    0 when the command returns None, else what it returns; the `exit_code` of a ToolkitError (2 for bad usage); 1 for an
    operating-system error (a full disk, a read-only folder); 130 on Ctrl-C. A failure is one line on stderr, which
    begins with the rank if there are several processes; `--debug` prints the traceback before it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELL_OUT)
    if _rank() not in ("", "0"):
        sys.excepthook = _print_traceback
    sys.exit(_exit_code(lambda: _parse_and_run(app.meta, arguments, app.name[0]), debug=False))


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Spell out what a terminal cannot print: x for a multiplication sign, else its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(each) or each.encode("ascii", "backslashreplace").decode() for each in text), error.end


codecs.register_error(_SPELL_OUT, _spell_out)


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
        advice = "; raise the limit (ulimit -n 1024)" if error.errno == errno.EMFILE else ""
        return _print_failure(error, f"{path}{error.strerror or error}{advice}", 1, debug)
    except KeyboardInterrupt as error:
        return _print_failure(error, "interrupted", INTERRUPTED, debug)


def _print_failure(error: BaseException, message: str, code: int, debug: bool) -> int:
    shown = "".join(traceback.format_exception(error)) if debug else ""
    rank = f"rank {_rank()}: " if _rank() else ""
    _print_error(without_password(f"{shown}error: {' '.join(f'{rank}{message}'.split())}\n"))
    return code


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an exception that nobody handles: a `sys.excepthook`."""
    _print_error("".join(traceback.format_exception(kind, error, trace)))


def _print_error(text: str) -> None:
    """Print on stderr in one write, which no line of another process can tear."""
    terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
    shared = terminal and _rank() not in ("", "0")
    sys.stderr.write(text + "\n" * REDRAWN_ROWS if shared else text)
    sys.stderr.flush()


def _rank() -> str:
    """Give this process's rank among several; empty for a process on its own."""
    return os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
