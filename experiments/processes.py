"""Flags that say which of many processes this one is. They are no part of a run's identity: what is learned does not depend on them."""

from __future__ import annotations

import contextlib

from absl import flags

from kafjax.parallel import distributed

flags.DEFINE_string("coordinator", None, "Many processes: host:port of process 0. SLURM, Kubernetes and TPU pods say all this themselves.")
flags.DEFINE_integer("num_processes", None, "Many processes: how many there are. 1 starts alone, whatever is around.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Many processes: which one this is, from 0.", lower_bound=0)
flags.DEFINE_integer("start_timeout", distributed.TIMEOUT_SECONDS, "Many processes: seconds to wait for the others.", lower_bound=1)


def processes_from_flags() -> contextlib.AbstractContextManager[None]:
    """To be entered before JAX is used for anything."""
    values = flags.FLAGS
    return distributed.processes(values.coordinator, values.num_processes, values.process_id, values.start_timeout)
