"""Several hosts as one run: joining them, agreeing, one of them writing, and leaving together."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.config import Hosts
from jaxdiff.errors import JaxdiffError

LEAVING = 5.0
"""Seconds that a host which fails waits for the others to say the same."""


def join(hosts: Hosts) -> None:
    """Join the other hosts, before anything is computed; where no option says that there are any, do nothing.

    Raises JaxdiffError where the options and the environment do not tell who the hosts are.
    """
    if hosts == Hosts(timeout=hosts.timeout):
        return
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            hosts.index,
            cluster_detection_method=None if hosts.auto else "deactivate",
            heartbeat_timeout_seconds=hosts.timeout,
            shutdown_timeout_seconds=hosts.timeout,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise JaxdiffError(
            f"The hosts can not be joined ({reason}): give --hosts.auto on a TPU pod, under Slurm or in Kubernetes, "
            "or all of --hosts.coordinator ADDRESS:PORT, --hosts.count and --hosts.index."
        ) from error


def is_leader() -> bool:
    """Whether this host writes logs and pictures."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on once every host is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(answer: bool) -> bool:
    """Whether the answer is yes on every host."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.asarray(answer))))


def leave(status: int) -> None:
    """End this process though others may go on or hang: without the wait for them that ends a good run."""
    sys.stdout.flush()
    sys.stderr.flush()
    # where all fail for one reason they leave in order; a host that fails alone does not wait for the others
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVING)
    os._exit(status)


@contextmanager
def only_one(workdir: str | Path) -> Iterator[None]:
    """Keep other processes from training in a workdir; the lock goes with the process, however that ends.

    There is none on gs:// and the like, which know no locks. Raises JaxdiffError where another process has it.
    """
    folder = epath.Path(workdir)
    if not is_leader() or "://" in str(workdir):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise JaxdiffError(
            f"Another process trains in {workdir}: wait for it, end it, or choose another --workdir."
        ) from error
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:  # the run was refused before it left anything
            (folder / ".lock").unlink()
            folder.rmdir()
        lock.release()
