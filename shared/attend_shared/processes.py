"""Functions at work in processes of their own, where they may crash, hang, or leave a GPU's context broken behind them.

What `attend doctor` and `attend parity --jobs` run in. A process answers what it is asked, in order; one that dies or
hangs is a `Lost` that says how, and whoever asked goes on with a fresh one.

    python -m attend_shared.processes MODULE:FUNCTION      # the other end: pickles on standard input and output
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any

__all__ = ["CRASHES", "START", "Lost", "Process", "Processes", "main", "processors"]

START = 300.0
"""Seconds that a process may take until it is ready: it loads a framework, and starts a GPU."""

CRASHES = 5
"""Processes that one implementation may lose before the rest of its calls is given up."""


class Lost(RuntimeError):
    """A process gives no answer any more; the text says how it ended.

    Attributes:
        how: "crashed" or "hung".
        seconds: how long one that hung was waited for, else 0.
    """

    def __init__(self, text: str, how: str = "crashed", seconds: float = 0.0) -> None:
        super().__init__(text)
        self.how, self.seconds = how, seconds


class Process:
    """One of `Processes`; closed, it ends at once."""

    def __init__(self, work: str) -> None:
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (until it is closed)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "attend_shared.processes", work],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # where no Ctrl-C at a terminal reaches it, which would look like a crash
        )  # fmt: skip
        self._answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Put each answer into a tuple; an empty one where the process has ended."""
        stdout = self._process.stdout
        assert stdout is not None
        with stdout, suppress(Exception):  # half an answer: it has died
            while True:
                self._answers.put((pickle.load(stdout),))
        self._answers.put(())

    def ask(self, what: Any) -> None:
        """Ask for something; what was asked before need not be answered yet."""
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError):  # it has died, which the answer says
            pickle.dump(what, stdin)
            stdin.flush()

    def answer(self, limit: float) -> Any:
        """The next answer.

        Args:
            limit: seconds that it may take.

        Raises:
            Lost: there is none.
        """
        try:
            (answer,) = self._answers.get(timeout=limit)
        except queue.Empty:
            raise Lost(f"no answer in {limit:g} s", "hung", limit) from None
        except ValueError:
            raise Lost(self._died()) from None
        return answer

    def _died(self) -> str:
        """How it ended, with the last of what it said; where it does not end it is ended."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.wait()
        self._stderr.seek(0)
        lines = [line.rstrip() for line in self._stderr.read().splitlines() if line.strip()]
        head = f"its process was ended by signal {-status}" if status < 0 else f"its process ended with status {status}"
        head += ", as one is for which there is no memory" if status == -9 else ""
        return "\n  ".join([head, *(line[:200] for line in lines[-12:])])

    def kill(self) -> None:
        """End it, and wait for nothing."""
        self._process.kill()

    def close(self) -> None:
        """End it."""
        self.kill()
        self._process.wait()
        with suppress(OSError):  # what it did not read any more
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._stderr.close()


class Processes:
    """Threads, and the processes that they start; all end with the block.

    Args:
        jobs: how many threads.

    Attributes:
        pool: the threads.
        stopped: whether the block has ended, where threads still run.
    """

    def __init__(self, jobs: int) -> None:
        self.pool = ThreadPoolExecutor(max(1, jobs))
        self.stopped = False
        self._lock = threading.Lock()
        self._running: set[Process] = set()

    def start(self, work: str) -> Process:
        """A process.

        Args:
            work: "module:function", called there with an iterator over what it is asked and a function that is given
                each answer.
        """
        process = Process(work)
        with self._lock:
            self._running.add(process)
            if self.stopped:
                process.kill()
        return process

    def end(self, process: Process) -> None:
        """End one of them."""
        process.close()
        with self._lock:
            self._running.discard(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.kill()
        self.pool.shutdown()
        for process in self._running:
            process.close()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """The other end. What is printed goes to standard error, and where standard input ends, it has died who asked."""
    module, _, name = sys.argv[1].partition(":")
    function: Callable[[Iterator[Any], Callable[[Any], None]], None] = getattr(import_module(module), name)
    answers = open(os.dup(1), "wb")  # noqa: SIM115 (for as long as this lasts)
    os.dup2(2, 1)
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            with open(0, "rb", closefd=False) as stdin:
                while True:
                    asked.put(pickle.load(stdin))
        except EOFError:
            pass
        except BaseException:  # noqa: BLE001 (what cannot be read here: the end of all)
            traceback.print_exc()
        os._exit(1)

    def say(answer: Any) -> None:
        pickle.dump(answer, answers)
        answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    function(iter(asked.get, None), say)


if __name__ == "__main__":
    main()
