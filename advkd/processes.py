"""The processes that share a run, as torchrun starts them: who this one is, and how they meet.

torchrun (and `accelerate launch`) tells each process its number by environment variables; `joined`
makes one group of them. Within it a thread keeps in touch with the others several times a second,
so that none waits for one that has died, however long it has left the others alone. Outside of it,
and with one process, every function here returns at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # of one exchange within a step
SILENCE = timedelta(minutes=2)  # after which a process that says nothing counts as lost
PULSE = 0.1  # seconds between two signs of life
ROLL_CALL = 3.0  # seconds within which the living say so, once one is lost
GRACE = 10.0  # seconds that a process has to end by itself, once another is lost

Result = TypeVar("Result")


class ProcessError(RuntimeError):
    """Another process of the run ended, or does not go with this one; the message says which."""


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def launched() -> int:
    """How many processes the launcher has started for one run; 1 without a launcher."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0) if launched() > 1 else 0


def local_count() -> int:
    """How many of the processes are on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


class _Group:
    """This process in a group of several; the functions of this module speak to it."""

    def __init__(self, rank: int, count: int, store: dist.Store, cuda: bool):
        self.rank, self.count = rank, count
        self.store = dist.PrefixStore("advkd", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        self._pulses: Any = dist.new_group(backend="gloo", timeout=SILENCE)
        self._borders = self._texts = 0  # met so far
        self._stops = self._leaves = False
        self._table = [[0, 0, 0]] * count  # of every process: borders met, stops, leaves
        self.lost = ""  # the sentence that says who
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._keep_in_touch, daemon=True)
        self._thread.start()

    def _keep_in_touch(self) -> None:
        try:
            while not all(leaves for *_, leaves in self._table):
                own = torch.tensor([self._borders, self._stops, self._leaves], device="cpu")
                table = [torch.empty_like(own) for _ in range(self.count)]
                dist.all_gather(table, own, group=self._pulses)
                with self._changed:
                    self._table = [entry.tolist() for entry in table]
                    self._changed.notify_all()
                self._wake.wait(PULSE)
                self._wake.clear()
        except RuntimeError:
            lost = self._roll_call()
            with self._changed:
                self.lost = lost
                self._changed.notify_all()
            time.sleep(GRACE)  # what it is at may not end, such as a kernel that waits for others
            sys.stderr.write(f"advkd: {lost}\n")  # at once, since processes may share it
            sys.stderr.flush()
            os._exit(1)

    def _roll_call(self) -> str:
        """The sentence that says which processes are gone, as far as the others can tell."""
        others = [r for r in range(self.count) if r != self.rank]
        try:
            self.store.set(f"alive/{self.rank}", "")
            until = time.monotonic() + ROLL_CALL
            while True:
                ended = [r for r in others if self.store.check([f"ended/{r}"])]
                if ended:
                    why = self.store.get(f"ended/{ended[0]}").decode()
                    return f"process {ended[0]} of 0 to {self.count - 1} ended: {why}"
                silent = [r for r in others if not self.store.check([f"alive/{r}"])]
                if not silent or time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return "the process that keeps the others together died, or cannot be reached"
        if not silent:
            return f"the connection between processes 0 to {self.count - 1} was lost"
        names = " and ".join(map(str, silent))
        return f"process {names} of 0 to {self.count - 1} died, or cannot be reached"

    def failed(self) -> ProcessError:
        """What to raise where an exchange with the others has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost, 2 * ROLL_CALL)
        return ProcessError(self.lost or "an exchange between processes failed")

    def _wait_until(self, all_are: Callable[[list[int]], bool]) -> None:
        self._wake.set()
        with self._changed:
            while not (self.lost or all(map(all_are, self._table))):
                self._changed.wait(1.0)  # a signal's handler runs in between
        if self.lost:
            raise ProcessError(self.lost)

    def barrier(self) -> None:
        self._borders += 1
        border = self._borders
        self._wait_until(lambda entry: entry[0] >= border)

    def stopping(self, asked: bool) -> bool:
        self._stops |= asked
        return self._stops or any(entry[1] for entry in self._table)

    def exchange(self, text: str) -> list[str]:
        self._texts += 1
        try:
            self.store.set(f"text/{self._texts}/{self.rank}", text)
            self.barrier()
            keys = [f"text/{self._texts}/{r}" for r in range(self.count)]
            return [self.store.get(key).decode() for key in keys]
        except dist.DistError:
            raise self.failed() from None

    def close(self, error: BaseException | None) -> None:
        """Part from the others: with them, or at once after an error, whose sentence they get."""
        if error is not None:
            if not isinstance(error, ProcessError):
                words = str(error).strip().partition("\n")[0] or type(error).__name__
                with contextlib.suppress(RuntimeError):
                    self.store.set(f"ended/{self.rank}", words)
            return
        self.barrier()
        self._leaves = True
        self._wake.set()
        self._thread.join()
        dist.destroy_process_group()


def _own_store(store: dist.Store, rank: int, count: int) -> dist.Store:
    """A part of the store for these processes alone. torchrun gives those that it starts again the
    store of those before, whose addresses are still there.

    The first process names the part; the others greet it there by a word of their own until it has
    seen all of them, so that nobody takes the name that an earlier first process left.
    """
    until = time.monotonic() + TIMEOUT.total_seconds()
    word = uuid.uuid4().hex
    if rank == 0:
        store.set("advkd/part", word)
        greetings = [f"advkd/{word}/{r}" for r in range(1, count)]
        while not store.check(greetings):
            if time.monotonic() > until:
                raise RuntimeError(f"not all came in {TIMEOUT.total_seconds():.0f} seconds")
            time.sleep(0.05)
        store.set(f"advkd/{word}/seen", " ".join(store.get(key).decode() for key in greetings))
        return dist.PrefixStore(f"advkd/{word}", store)
    while time.monotonic() < until:
        part = store.get("advkd/part").decode()
        store.set(f"advkd/{part}/{rank}", word)
        seen = f"advkd/{part}/seen"
        if store.check([seen]) and word in store.get(seen).decode():
            return dist.PrefixStore(f"advkd/{part}", store)
        time.sleep(0.05)
    raise RuntimeError(f"the first did not come in {TIMEOUT.total_seconds():.0f} seconds")


_group: _Group | None = None


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within `with`, this process is one of those that the launcher has started, if any.

    ProcessError where they cannot meet. After an error here the others end too, and say so.
    """
    global _group
    if launched() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        _group = _Group(rank, count, _own_store(store, rank, count), device.type == "cuda")
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProcessError(f"the {launched()} processes could not meet: {reason}") from None
    try:
        yield
    except BaseException as error:
        _group.close(error)
        raise
    else:
        _group.close(None)
    finally:
        _group = None


def count() -> int:
    """How many processes share the run."""
    return _group.count if _group else 1


def rank() -> int:
    """This process's number, from 0."""
    return _group.rank if _group else 0


def is_first() -> bool:
    """Whether this is the process that writes what only one may."""
    return rank() == 0


def barrier() -> None:
    """Return once every process is here; ProcessError as soon as one has died."""
    if _group:
        _group.barrier()


def in_turn(work: Callable[[], Result]) -> Result:
    """`work()` of the first process, and then, from what it left, of all others."""
    if not is_first():
        barrier()
    result = work()
    if is_first():
        barrier()
    barrier()
    return result


def exchange(text: str) -> list[str]:
    """The text of every process, in order."""
    return _group.exchange(text) if _group else [text]


def stopping(asked: bool) -> bool:
    """Whether any process was asked to stop, or has lost another, as far as is known by now."""
    return _group.stopping(asked) or bool(_group.lost) if _group else asked


def any_of(asked: bool) -> bool:
    """Whether any process says so; all get the same answer, at the same step."""
    if _group is None:
        return asked
    flag = torch.tensor([asked], dtype=torch.int32, device="cpu")
    _exchanged(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX))
    return bool(flag)


def share_of(items: Sequence[Result]) -> list[Result]:
    """This process's stretch of `items`: as many as the others have, give or take one."""
    n, P, r = len(items), count(), rank()
    return list(items[n * r // P : n * (r + 1) // P])


def summed_in_order(rows: Sequence[Tensor], n: int) -> Tensor:
    """The sum of `n` rows in their order, of which this process holds `share_of(range(n))`.

    rows: flat, of one length and dtype. Each process adds up a stretch of all of them, so a row
    travels once; the same rows give the same bits whatever the number of processes.
    """
    P, length = count(), len(rows[0])
    stretch = -(-length // P)
    ours = rows[0].new_zeros(P, len(rows), stretch)
    for i, row in enumerate(rows):
        padded = torch.nn.functional.pad(row, (0, P * stretch - length))
        ours[:, i] = padded.view(P, stretch)
    counts = [n * (r + 1) // P - n * r // P for r in range(P)]
    theirs = rows[0].new_empty(n * stretch)
    total = rows[0].new_empty(P, stretch)
    _exchanged(
        lambda: dist.all_to_all_single(
            theirs, ours.view(-1), [c * stretch for c in counts], [len(rows) * stretch] * P
        )
    )
    part, *rest = theirs.view(n, stretch).unbind()
    for row in rest:
        part.add_(row)
    _exchanged(lambda: dist.all_gather(list(total.unbind()), part))
    return total.view(-1)[:length]


def summed(row: Tensor) -> Tensor:
    """The sum of the processes' rows, in an order that depends on how many they are."""
    _exchanged(lambda: dist.all_reduce(row))
    return row


def _exchanged(work: Callable[[], object]) -> None:
    try:
        work()
    except RuntimeError as error:
        assert _group is not None
        raise _group.failed() from error
