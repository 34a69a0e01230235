"""`isicdist` that counts the function calls of its steps: python counting_worker.py FOLDER ARGUMENTS...

At each line of the log, rank N appends to FOLDER/rank-N the step and the calls of all of its threads so far, of Python
and of C. They tell whether a step becomes more work, as a time does only where nothing else runs on the machine.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from isicdist.cli import main
from isicdist.train import Trainer

calls = 0


def count(frame: Any, event: str, argument: Any) -> None:
    global calls  # a class would be slower: this is called a hundred thousand times a second
    calls += event in ("call", "c_call")


if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    counts, log = Path(folder) / f"rank-{os.environ['RANK']}", Trainer.log

    def log_and_count(self: Trainer, *words: Any) -> None:
        log(self, *words)
        with counts.open("a") as file:
            print(self.state.step, calls, file=file)

    Trainer.log = log_and_count  # pyright: ignore[reportAttributeAccessIssue]
    threading.setprofile(count)
    sys.setprofile(count)
    main(arguments)
