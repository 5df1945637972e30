"""Processes killed at random: nothing is lost, and the result is the undisturbed run's to the byte."""
import random

import pytest

from service import *

KILLS = 20
STEPS = 2400


def long_spec(model, directory):
    return make_spec(model, write_rows(directory / "train.jsonl", short_rows(64)), adapter={"lora_dropout": 0.1}, data={"shuffle": True},
                     training={"max_steps": STEPS, "learning_rate": 0.0005, "logging_steps": 5}, checkpoint={"save_steps": 25}, limits={"max_restarts": 10})


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("calm") / "cluster", 2, [tiny.folder.parent])
    try:
        cluster.ppctl("models", "register", tiny.name, tiny.folder)
        job = cluster.submit(long_spec(tiny, cluster.dir))
        cluster.finish(job)
        folder = cluster.fetch(job)
        return adapter_digest(folder), history(folder)
    finally:
        cluster.down()


def kill_points(seed):
    """Steps at which to kill: spread over the run, never in its last part, so that each kill meets a live job."""
    return sorted(random.Random(seed).sample(range(20, STEPS - 300), KILLS))


@pytest.mark.parametrize("victim", ["coordinator", "trainer", "worker"])
def test_twenty_kills_change_nothing(cluster, undisturbed, tiny, victim):
    cluster.roots = [tiny.folder.parent]
    cluster.down()
    cluster.up()
    cluster.ppctl("models", "register", tiny.name, tiny.folder)
    job = cluster.submit(long_spec(tiny, cluster.dir))
    dice = random.Random(victim)
    for point in kill_points(victim):
        wait_for(f"step {point}", lambda: cluster.step(job) >= point, every=0.02)
        assert cluster.state(job) not in ENDED, "the job ended before all kills: it needs more steps"
        if victim == "trainer":
            alive = wait_for("a trainer", cluster.trainers, every=0.02)
            try:
                os.kill(dice.choice(alive), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself in this moment: the next kill counts
        else:
            cluster.kill("coordinator" if victim == "coordinator" else f"worker-{dice.randrange(2)}")
            cluster.up()
    cluster.finish(job)
    folder = cluster.fetch(job)
    assert history(folder) == undisturbed[1]
    assert adapter_digest(folder) == undisturbed[0]
    restarts = int(cluster.status(job)["restarts"])
    if victim == "coordinator":
        assert restarts == 0, "the coordinator's death must not stop training"
    else:
        assert restarts >= KILLS // 2


def test_a_coordinator_killed_right_after_submit_knows_the_job(cluster, tiny):
    cluster.roots = [tiny.folder.parent]
    cluster.down()
    cluster.up()
    cluster.ppctl("models", "register", tiny.name, tiny.folder)
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(16)), training={"max_steps": 3, "warmup_steps": 1})
    jobs = []
    for index in range(5):
        jobs.append(cluster.submit(merge(spec, {"name": f"job-{index}"})))
        cluster.kill("coordinator")
        cluster.up()
    assert {job["id"] for job in cluster.json("list")["jobs"]} == set(jobs)
    for job in jobs:
        cluster.finish(job)


def test_a_stopped_trainer_is_ended_and_the_job_goes_on(cluster, tiny):
    cluster.roots = [tiny.folder.parent]
    cluster.down()
    cluster.up()
    cluster.ppctl("models", "register", tiny.name, tiny.folder)
    job = cluster.submit(make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(64)), training={"max_steps": 600}, limits={"stall_timeout": "3s"}))
    wait_for("some steps", lambda: cluster.step(job) > 20, every=0.02)
    os.kill(cluster.trainers()[0], signal.SIGSTOP)
    cluster.finish(job)
    assert int(cluster.status(job)["restarts"]) >= 1
    assert cluster.trainers() == []
