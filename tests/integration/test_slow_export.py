"""An export that takes longer than limits.stall_timeout, on a disk that is slow with the merged files of the pipeline's first rank."""
import os
import subprocess

import pytest

from service import *

SLOW = {"SLOW_FILE": "/merged-rank-0.", "SLOW_WRITES": "20", "SLOW_MILLISECONDS": "350"}  # seven seconds of a first half of the model
STALL = "4s"


@pytest.fixture(scope="module")
def slow_disk(tmp_path_factory):
    library = tmp_path_factory.mktemp("preload") / "libslow_disk.so"
    subprocess.run([os.environ.get("CXX", "c++"), "-O1", "-shared", "-fPIC", "-o", library, pathlib.Path(__file__).with_name("slow_disk.cc")], check=True)
    return {**SLOW, "LD_PRELOAD": str(library)}


@pytest.fixture
def slow_cluster(tmp_path, tiny, slow_disk, monkeypatch):
    for name, value in slow_disk.items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path, tiny, workers=8) as running:
        for name in slow_disk:
            monkeypatch.delenv(name)
            running.environment.pop(name)
        yield running


def exporter(cluster, job):
    """Pid of the trainer that writes the slow file of the job, while it does."""
    for pid in cluster.trainers():
        with contextlib.suppress(OSError):
            folder = pathlib.Path(os.readlink(f"/proc/{pid}/cwd"))
            if f"/{job}-" in str(folder) and list(folder.glob("output/merged-rank-0.*")):
                return pid
    return None


def test_a_trained_job_is_not_lost_to_a_slow_disk_and_a_stopped_exporter_is_ended(slow_cluster, tiny):
    """Three jobs at once. Replicas that have nothing to write wait for the first one's; so does the second stage, which is done with its half at once."""
    cluster = slow_cluster
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(32)), training={"max_steps": 2, "warmup_steps": 1}, output={"formats": ["adapter", "merged"]},
                     limits={"stall_timeout": STALL, "max_restarts": 5})
    layout = lambda dp, pp, zero: merge(spec, {"name": f"dp{dp}-pp{pp}-zero{zero}", "parallel": {"data_parallel_size": dp, "pipeline_parallel_size": pp, "zero_stage": zero}})
    whole, shared, stopped = [cluster.submit(layout(*each)) for each in ((2, 1, 0), (2, 2, 3), (1, 2, 0))]

    pid = wait_for("the export", lambda: exporter(cluster, stopped), every=0.05)
    os.kill(pid, signal.SIGSTOP)
    wait_for("the stopped exporter to be ended", lambda: not pathlib.Path(f"/proc/{pid}").exists())
    wait_for("the reason", lambda: any(words in cluster.ppctl("events", stopped).stdout for words in ("is stopped", "lost by rank 1")))
    cluster.ppctl("cancel", stopped)

    for job in (whole, shared):
        cluster.finish(job)
        assert list(cluster.fetch(job, "merged").glob("*.safetensors"))
