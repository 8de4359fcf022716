"""Run a function in several processes that know of each other, as `accelerate launch` starts them.

Forked from a server that has imported torch already, so that a group costs a fraction of a second.
"""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["accelerate", "stages.distill.training", "tests.stages.lessons"]
LONGEST_S = 120.0


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a module gives in each of `count` processes; raises what one raised."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, count, port, ends[rank][1], function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    results = [
        pickle.loads(receiver.recv_bytes()) if receiver.poll(LONGEST_S) else None
        for receiver, _ in ends
    ]
    for process in processes:
        process.join(LONGEST_S)
    for result in results:
        if not isinstance(result, tuple):
            raise result or AssertionError("a process gave no answer")
    return [value for (value,) in results]


def _run(rank: int, count: int, port: int, end: Any, function: Callable, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    from stages.ranks import join_ranks

    try:
        ranks = join_ranks()
        # multiprocessing's own pickler would share a tensor's memory, which goes with the process
        end.send_bytes(pickle.dumps((function(ranks, *arguments),)))
        ranks.leave()
    except (ValueError, RuntimeError, ArithmeticError, AssertionError, TypeError) as error:
        end.send_bytes(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")))
        raise
