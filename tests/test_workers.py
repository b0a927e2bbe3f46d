"""Many threads and processes: each gets torch's result, and none waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fusedloss.functional as FL
from cases import BASIC, Sample, at_shape
from helpers import assert_same_bits, leaf, threads

pytestmark = pytest.mark.usefixtures("compiled")


def step(loss: str, sample: Sample, upstream: float) -> Tensor:
    input = leaf(sample.input)
    value = getattr(FL, loss)(input, sample.target)
    return torch.autograd.grad(value, input, torch.tensor(upstream))[0]


def test_many_threads_at_once() -> None:
    """All losses, with small and large tensors, on one and on several compute threads."""
    samples = [
        (loss, at_shape(loss, shape).sample(torch.float32))
        for loss in BASIC
        for shape in ((3, 5), (64, 700))
    ]
    expected = [[step(*pair, upstream) for upstream in (1.0, 0.3)] for pair in samples]

    def work(first: int) -> None:
        for i in range(3 * len(samples)):
            which = (first + i) % len(samples)
            for k, upstream in enumerate((1.0, 0.3)):
                got = step(*samples[which], upstream)
                assert_same_bits(got, expected[which][k], f"{samples[which][0]} by {upstream}")

    for count in (1, 2):
        with threads(count), ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def answer(queue: multiprocessing.Queue[list[float]]) -> None:
    torch.set_num_threads(1)  # like torch's data workers
    sample = at_shape("cross_entropy", (40, 700)).sample(torch.float32)
    queue.put(step("cross_entropy", sample, 0.5).sum(0).tolist())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    """The parent has computed before, on several threads."""
    sample = at_shape("cross_entropy", (40, 700)).sample(torch.float32)
    with threads(2):
        expected = step("cross_entropy", sample, 0.5).sum(0).tolist()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=answer, args=(queue,), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert queue.get(timeout=60) == expected
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_another_thread_computes() -> None:
    """The child does not wait for a lock that a thread of its parent held."""
    enough = threading.Event()
    numbers = torch.randn(20_000)

    def compute() -> None:
        length = 1
        while not enough.is_set():  # every size makes another entry in the table behind the lock
            length = length % 10_000 + 1
            FL.mse_loss(leaf(numbers[:length]), numbers[:length])

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        for _ in range(60):
            child = os.fork()
            if child == 0:
                FL.mse_loss(leaf(numbers[:3]), numbers[:3])
                os._exit(0)
            for _ in range(1000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.01)
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child of a fork waits for ever")
            assert status == 0
    finally:
        enough.set()
        busy.join()
