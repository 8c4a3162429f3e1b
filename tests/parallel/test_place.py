"""The place of a process among many, read from the environment that schedulers set."""

from __future__ import annotations

import pytest

from kafjax.core.errors import UserError
from kafjax.parallel.place import Place, ask_tpu_host, find_place, first_host

# As srun sets them for the third of four tasks, two on each of two hosts.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
POD = {
    "JAX_COORDINATOR_ADDRESS": "train-0.train:1234",
    "JAX_NUM_PROCESSES": "3",
    "JOB_COMPLETION_INDEX": "1",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}


def test_alone_is_no_place():
    assert find_place({}) is None
    assert find_place({}, num_processes=1) is None
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_place(SLURM, num_processes=1) is None  # said explicitly
    batch_script = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert find_place({**batch_script, "SLURM_PROCID": "0"}) is None
    # one of many independent runs
    assert find_place({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


def test_slurm_step():
    place = find_place(SLURM)
    assert (place.num_processes, place.process_id, place.source) == (4, 2, "SLURM")
    host, port = place.coordinator.split(":")
    assert host == "node07" and 61_440 <= int(port) < 65_536
    for other in ("0", "1", "3"):
        assert find_place({**SLURM, "SLURM_PROCID": other}).coordinator == place.coordinator
    # two steps of a job may run at once
    assert find_place({**SLURM, "SLURM_STEP_ID": "1"}).coordinator != place.coordinator
    assert find_place({**SLURM, "JAX_COORDINATOR_ADDRESS": "login:99"}).coordinator == "login:99"


def test_accelerators_of_a_slurm_host_are_dealt_to_its_tasks():
    assert find_place({**SLURM, "SLURM_LOCALID": "1"}).local_devices == (1,)
    assert find_place(
        {**SLURM, "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    ).local_devices == (1,)
    # SLURM has dealt them
    assert (
        find_place({**SLURM, "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"}).local_devices
        is None
    )
    # one task a host takes all
    assert find_place({**SLURM, "SLURM_STEP_NUM_NODES": "4"}).local_devices is None


def test_kubernetes_indexed_job():
    assert find_place(POD) == Place("train-0.train:1234", 3, 1, source="Kubernetes")
    # several jobs of a JobSet count on
    assert find_place({**POD, "JAX_PROCESS_ID": "2"}).process_id == 2


def test_explicit_goes_first():
    assert find_place(SLURM, "here:1", 2, 1) == Place("here:1", 2, 1)
    assert find_place(
        {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    ) == Place("here:1", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("here:1", 2, None), "without process_id: give --process_id or set JAX_PROCESS_ID"),
        ((None, 2, 0), "without coordinator: give --coordinator or set JAX_COORDINATOR_ADDRESS"),
        ((None, None, 0), "process_id=0 without coordinator"),
        (("here:1", 2, 2), "process_id=2, num_processes=2 (from flags)"),
        (("here", 2, 0), "is not of the form host:port"),
    ],
)
def test_what_is_missing_is_named(arguments, told):
    with pytest.raises(UserError) as error:
        find_place({}, *arguments)
    assert told in str(error.value)


def test_a_number_that_is_none_is_named():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two' is not a number"):
        find_place({"JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,other", "node001"),
        ("node[001-015],other", "node001"),
        ("node[001,007-015],other", "node001"),
        ("tpu[007-009,12]-ib,gpu1", "tpu007-ib"),
        ("a-1.b.example", "a-1.b.example"),
    ],
)
def test_first_of_slurms_hosts(nodes, host):
    assert first_host(nodes) == host


def test_tpu_slices_of_several_hosts():
    pod = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2", "JOB_COMPLETION_INDEX": "2"}
    assert find_place(pod) == Place("a:8482", 3, 2, source="TPU pod")
    slices = {
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first:8081",
    }
    assert find_place({**pod, **slices}) == Place("first:8482", 6, 5, source="TPU pod")
    assert find_place({**slices, "TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}) == Place(
        "first:8482", 2, 1, source="TPU pod"
    )
    assert find_place({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}) is None
    assert (
        find_place({**pod, "JAX_PLATFORMS": "cpu"}) is None
        and find_place({**pod, "JAX_PLATFORMS": "tpu"}) is not None
    )
    assert find_place(pod, num_processes=1) is None
    assert find_place(pod, "here:1", 2, 1) == Place("here:1", 2, 1)
    with pytest.raises(
        UserError, match="names 3 hosts, but TPU_WORKER_ID does not say which this is"
    ):
        find_place({"TPU_WORKER_HOSTNAMES": "a,b,c"})


def test_tpu_host_of_which_only_the_metadata_server_knows(tmp_path):
    assert not ask_tpu_host({}, tmp_path)
    (tmp_path / "accel0").touch()
    assert ask_tpu_host({}, tmp_path)
    assert not ask_tpu_host({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path) and not ask_tpu_host(
        {"TPU_WORKER_HOSTNAMES": "a"}, tmp_path
    )
    assert not ask_tpu_host({"JAX_PLATFORMS": "cpu"}, tmp_path)
