"""What ends a run early, and how a command says so: in lines that a user can act on, with an exit code."""

import json
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot work. Each of `problems` is one line naming the place, the value and the cure."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class Stopped(Exception):
    """A signal came; what was under way is kept and goes on where the same command is given again."""


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")  # how torch says so
GRACE_SECONDS = 20
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later


def one_line(text, most: int = 800) -> str:
    """A text, such as an error's, as one line of at most about so many characters, without its middle if need be."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most // 2]} … {line[-most // 2:]}"


@contextmanager
def errors_as_lines():
    """For commands: end with one line a problem and exit code 2 where the input is at fault, 1 where the machine is,
    75 where a signal has stopped it.

    Warnings become lines too.
    """
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except InputError as error:
        # from a process that decodes images the message arrives with that process's traceback before it
        problems = [problem.splitlines()[-1].removeprefix("vitopt.errors.InputError: ") for problem in error.problems]
        _end(2, [f"error: {problem}" for problem in problems])
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(1, [f"error: {where}{error.strerror or error}: finished rows are kept; mend this and start again"])
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            _end(1, [f"error: a process that decodes images is gone ({one_line(error, 200)}), often for want of "
                     "memory: take fewer data.workers; finished rows and checkpoints are kept, and the same command "
                     "goes on"])
        if not any(words in str(error) for words in LOST):
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]
        _end(1, [f"error: another process of this run is gone ({one_line(reason, 200)}): what it has printed tells "
                 "why; finished rows and checkpoints are kept, and the same command goes on"])
    except (Stopped, KeyboardInterrupt) as error:
        _end(START_AGAIN, [str(error) or "stopped: finished rows are kept; the same command goes on"])
    finally:
        signal.signal(signal.SIGTERM, before)


def outlive_signals(worker: int) -> None:
    """Called in a process that decodes images: schedulers and terminals signal these too, and the steps until all
    processes have stopped still need them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


def _stop(number, frame):
    raise Stopped()


def _end(code: int, lines: list[str]) -> None:
    launcher_quotes = os.environ.get("TORCHELASTIC_ERROR_FILE")  # at the end of its own report
    if launcher_quotes:
        Path(launcher_quotes).write_text(json.dumps({"message": "\n".join(lines), "timestamp": int(time.time())}))
    if not launcher_quotes or os.environ.get("LOCAL_RANK") == "0":
        print("\n".join(lines), file=sys.stderr)
    sys.exit(code)
