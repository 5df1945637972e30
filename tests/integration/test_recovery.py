"""Processes killed at random: nothing is lost, and the result is the undisturbed run's to the byte."""
import contextlib
import random
import shutil

import pytest

from service import *

KILLS = 20
STEPS = 400


@pytest.fixture
def cluster(tmp_path, tiny):
    with serving(tmp_path, tiny) as running:
        yield running


def long_spec(model, directory):
    return make_spec(model, write_rows(directory / "train.jsonl", short_rows(64)), adapter={"lora_dropout": 0.1}, data={"shuffle": True},
                     training={"max_steps": STEPS, "gradient_accumulation_steps": 2, "learning_rate": 0.0005, "logging_steps": 5}, checkpoint={"save_steps": 20}, limits={"max_restarts": KILLS})


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("calm"), tiny) as cluster:
        job = cluster.submit(long_spec(tiny, cluster.dir))
        cluster.finish(job)
        folder = cluster.fetch(job)
        return adapter_digest(folder), history(folder)


def reaches(cluster, job, step):
    """Waits until the job has done `step` steps; False if it ended before."""
    def there():
        for _ in range(50):
            if cluster.step_now(job) >= step:
                return True
            time.sleep(0.005)
        return cluster.state(job) in ENDED

    wait_for(f"step {step}", there, every=0)
    return cluster.state(job) not in ENDED


@pytest.mark.parametrize("victim", ["coordinator", "trainer", "worker"])
def test_twenty_kills_change_nothing(cluster, undisturbed, tiny, victim):
    """At random steps, in as many equal jobs as it takes on this machine: each of them ends as the undisturbed one did."""
    spec, dice, jobs, kills, target = long_spec(tiny, cluster.dir), random.Random(victim), [], 0, 0
    while kills < KILLS:
        if not jobs or cluster.state(jobs[-1]) in ENDED:
            jobs.append(cluster.submit(spec))
            target = 0
        target = max(target, cluster.step_now(jobs[-1])) + dice.randint(1, 40)
        if not reaches(cluster, jobs[-1], min(target, STEPS)):
            continue
        if victim == "trainer":
            alive = cluster.trainers()
            if not alive:
                continue  # between two attempts
            try:
                os.kill(dice.choice(alive), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself in this moment
        else:
            cluster.kill("coordinator" if victim == "coordinator" else f"worker-{dice.randrange(2)}")
            cluster.up()
        kills += 1
    for job in jobs:
        cluster.finish(job)
        folder = cluster.fetch(job)
        assert history(folder) == undisturbed[1]
        assert adapter_digest(folder) == undisturbed[0]
    assert len(cluster.json("list")["jobs"]) == len(jobs)
    restarts = sum(int(cluster.status(job)["restarts"]) for job in jobs)
    if victim == "coordinator":
        assert restarts == 0, "the coordinator's death must not stop training"
    else:
        assert restarts >= KILLS // 2


def test_a_coordinator_killed_right_after_submit_knows_the_job(cluster, tiny):
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
    """The time without progress is short for a test, and long enough for a machine that is busy with other things."""
    job = cluster.submit(make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(64)), training={"max_steps": 1000, "logging_steps": 10}, limits={"stall_timeout": "10s"}))
    assert reaches(cluster, job, 20)
    os.kill(cluster.trainers()[0], signal.SIGSTOP)
    cluster.finish(job)
    assert int(cluster.status(job)["restarts"]) >= 1
    events = cluster.ppctl("events", job).stdout
    assert "COMM_ERROR" in events and ("lost rank" in events or "is stopped" in events), events
    wait_for("the trainers to go", lambda: cluster.trainers() == [])


DAMAGED_SPEC = {"adapter": {"lora_dropout": 0.1}, "data": {"val_set_size": 0.2, "shuffle": True}, "training": {"max_steps": 120, "learning_rate": 0.05, "max_grad_norm": 0},
                "evaluation": {"eval_steps": 10}, "checkpoint": {"save_steps": 10, "save_total_limit": 3}, "limits": {"max_restarts": 1}}


@pytest.fixture(scope="module")
def overtrained(tiny, tmp_path_factory):
    """Of a run whose best checkpoint is not its newest."""
    with serving(tmp_path_factory.mktemp("overtrained"), tiny) as cluster:
        job = cluster.submit(make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(40)), **DAMAGED_SPEC))
        cluster.finish(job)
        folder = cluster.fetch(job)
        return adapter_digest(folder), history(folder)


def stand_still(cluster, job, step):
    """Stops the trainers at some step from `step` on, and waits until what they had written has arrived. Their pids, or none if the job was about to end."""
    if not reaches(cluster, job, step):
        return []
    trainers = cluster.trainers()
    for pid in trainers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    kept, looks = None, 0
    while looks < 6:
        before, kept = kept, cluster.json("checkpoints", job)["checkpoints"]
        looks = looks + 1 if before == kept else 0
        time.sleep(0.5)
    if len(trainers) == 2 and cluster.state(job) == "RUNNING":
        return trainers
    for pid in trainers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.finish(job)
    return []


@pytest.mark.parametrize("which", ["newest", "best", "all"])
def test_a_damaged_checkpoint_sends_the_job_back_to_an_older_one(cluster, overtrained, tiny, which):
    for _ in range(10):  # again where the machine was busy with other things at the moment that matters
        job = cluster.submit(make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(40)), **DAMAGED_SPEC))
        trainers = stand_still(cluster, job, 65)
        if trainers:
            break
    assert trainers, "each of the jobs was over before it could be stopped"
    listed = lambda: cluster.json("checkpoints", job)["checkpoints"]
    kept = listed()
    steps = [int(one["state"]["step"]) for one in kept]
    best = max(int(one["state"]["step"]) for one in kept if one.get("best"))
    assert len(steps) == 3 and best < steps[-1], (steps, best)
    hit = {"newest": steps[-1:], "best": [best], "all": steps}[which]
    for checkpoint in kept:
        if int(checkpoint["state"]["step"]) in hit:
            sha256 = checkpoint["files"][-1]["sha256"]
            path = cluster.dir / "coordinator" / "blobs" / sha256[:2] / sha256
            path.chmod(0o600)  # others than root may not write to it
            with open(path, "r+b") as blob:
                blob.seek(-5, os.SEEK_END)
                byte = blob.read(1)
                blob.seek(-1, os.SEEK_CUR)
                blob.write(bytes([byte[0] ^ 1]))
    for pid in trainers:
        os.kill(pid, signal.SIGKILL)
    cluster.finish(job)
    folder = cluster.fetch(job)
    assert adapter_digest(folder) == overtrained[0] and history(folder) == overtrained[1]
    notes = [line for line in cluster.ppctl("events", job).stdout.splitlines() if "is not used any more" in line]
    found = [int(re.search(r"the checkpoint of step (\d+) is not used", note)[1]) for note in notes]
    assert found and set(found) <= set(hit), (found, hit)
    if which == "newest":
        assert len(notes) == 1 and "goes back to the one of step" in notes[0] and "damaged" in notes[0], notes
    else:  # all that came after the best one need it
        assert "starts again from the beginning" in notes[-1], notes
    assert not any(one["damage"] for one in listed()), "all of these steps were saved again, or dropped"


def test_damaged_training_data_is_the_operators_and_prepared_anew_for_the_next_job(cluster, tiny):
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(16)), training={"max_steps": 3, "warmup_steps": 1}, limits={"max_restarts": 0})
    first = cluster.submit(spec)
    cluster.finish(first)
    cluster.down()
    tokens = [blob for blob in (cluster.dir / "coordinator" / "blobs").glob("*/*") if b'"supervised"' in blob.read_bytes()[:2000]]
    assert len(tokens) == 1
    content = bytearray(tokens[0].read_bytes())
    content[-1] ^= 1
    tokens[0].chmod(0o600)
    tokens[0].write_bytes(content)
    for worker in range(2):  # else nobody would ask for the file
        shutil.rmtree(cluster.dir / f"worker-{worker}" / "cache")
    cluster.up()
    second = cluster.submit(spec)
    cluster.finish(second, state="FAILED")
    reason = cluster.status(second)["reason"]
    assert reason["code"] == "STORE_UNREADABLE" and reason["owner"] == "OPERATOR" and str(tokens[0]) in reason["message"], reason
    third = cluster.submit(spec)
    cluster.finish(third)
    assert adapter_digest(cluster.fetch(third)) == adapter_digest(cluster.fetch(first))
