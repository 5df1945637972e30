"""Workers by name: who may have one, and what `deploy/local up` makes of a worker that is on its way out."""
from service import *


class Worker:
    """A ppft-worker beside those of the cluster."""

    def __init__(self, cluster, folder, *arguments):
        self.path = cluster.dir / f"{folder}.log"
        self.process = subprocess.Popen([BIN / "ppft-worker", "--coordinator", cluster.environment["PPCTL_SERVER"], "--devices", "cpu:1", "--threads_per_slot", "1", "--work_dir",
                                         cluster.dir / folder, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=open(self.path, "w"))

    def log(self):
        return self.path.read_text()

    def end(self):
        self.process.terminate()
        self.process.wait(120)


def ready(cluster):
    return sorted(worker["name"] for worker in cluster.json("workers", "list")["workers"] if worker["state"] == "ready")


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_name_in_use_is_refused_until_its_worker_has_gone(cluster):
    first = cluster.pid("worker-0")
    stranger = Worker(cluster, "stranger", "--name", "worker-0")
    try:
        wait_for("the refusal", lambda: 'the name "worker-0" is in use' in stranger.log() and "--name" in stranger.log())
        assert cluster.pid("worker-0") == first and pathlib.Path(f"/proc/{first}").exists()
        assert ready(cluster) == ["worker-0"]
        assert stranger.process.poll() is None, "it keeps trying: the first may be a dead process whose connection lingers"
        os.kill(first, signal.SIGKILL)
        wait_for("the name's next owner", lambda: "linked to the coordinator" in stranger.log())
        assert ready(cluster) == ["worker-0"]
    finally:
        stranger.end()


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_workers_of_one_host_need_no_names_if_their_folders_differ(cluster):
    others = [Worker(cluster, folder) for folder in ("one", "two")]
    try:
        wait_for("both", lambda: len(ready(cluster)) == 3)
        names = ready(cluster)
        for other in others:
            other.end()
        others = [Worker(cluster, folder) for folder in ("one", "two")]
        wait_for("both again", lambda: all("linked to the coordinator" in other.log() for other in others))
        assert ready(cluster) == names, "stable over restarts"
    finally:
        for other in others:
            other.end()


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_up_waits_for_a_worker_that_is_stopping_and_starts_it_again(cluster, tiny, tmp_path):
    cluster.roots.append(tiny.folder.parent)
    cluster.up()
    cluster.ppctl("models", "register", tiny.name, tiny.folder)
    train = write_rows(tmp_path / "train.jsonl", short_rows(32))
    job = cluster.submit(make_spec(tiny, train, training={"max_steps": 100000}, parallel={"pipeline_parallel_size": 1}))
    wait_for("a step", lambda: cluster.step(job) > 0)
    (trainer,) = cluster.trainers()
    old = cluster.pid("worker-0")
    os.kill(trainer, signal.SIGSTOP)  # it does not hear that it has to stop: its worker waits for it
    os.kill(old, signal.SIGTERM)
    cluster.up()
    assert cluster.pid("worker-0") != old
    assert ready(cluster) == ["worker-0"]
    cluster.ppctl("cancel", job)
