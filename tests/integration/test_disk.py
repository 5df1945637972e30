"""The coordinator's disk: full, and full of files that nothing names; folders that are not there or hold rubbish."""
import errno
import hashlib
import os
import signal
import sqlite3
import subprocess

import pytest

from service import *


@pytest.fixture
def small_disk(tmp_path):
    """A cluster whose coordinator has a disk of 48 MiB of its own."""
    data = tmp_path / "cluster" / "coordinator"
    data.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", data], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here (root may): {done.stderr.strip()}")
    running = None
    try:
        running = Cluster(tmp_path / "cluster", 2, [])
        yield running
    finally:
        if running is not None:
            running.down()
        subprocess.run(["umount", "-l", data], check=True)


def fill(folder):
    """A file that takes the last byte of the folder's disk."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as out:
        for size in (1 << 20, 4096):
            try:
                while True:
                    out.write(b"\0" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


def adopt(cluster, tiny):
    cluster.roots = [tiny.folder.parent]
    cluster.down()
    cluster.up()
    cluster.ppctl("models", "register", tiny.name, tiny.folder)


def paused_for_disk(cluster, job):
    shown = cluster.ppctl("get", job, "-o", "json", expect=None)
    if shown.returncode == 5:
        return False  # UNAVAILABLE while the store has no room at all
    status = json.loads(shown.stdout)["status"]
    return status["state"].endswith("PAUSED") and status["reason"]["code"] == "DISK_FULL"


def test_a_full_disk_pauses_what_runs_and_what_waits_until_there_is_room(small_disk, tiny):
    cluster = small_disk
    adopt(cluster, tiny)
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(32)), training={"max_steps": 800}, checkpoint={"save_steps": 10})
    running = cluster.submit(spec)
    waiting = cluster.submit(merge(spec, {"name": "waiting", "training": {"max_steps": 10}}))
    wait_for("a checkpoint", lambda: int(cluster.status(running).get("checkpoint_step", 0)) >= 10, every=0.05)
    filler = fill(cluster.dir / "coordinator")
    for job in (running, waiting):
        wait_for(f"{job} to pause", lambda: paused_for_disk(cluster, job), 60)
    assert "PAUSED(DISK_FULL)" in cluster.ppctl("list").stdout
    shown = cluster.ppctl("get", running).stdout
    assert "DISK_FULL" in shown and "goes on by itself" in shown
    (cluster.dir / "more.yaml").write_text(json.dumps(merge(spec, {"name": "more"})))
    assert "DISK_FULL" in cluster.ppctl("submit", "more.yaml", expect=None).stderr
    cluster.kill("coordinator")
    cluster.up()
    assert paused_for_disk(cluster, running) and paused_for_disk(cluster, waiting), "a restart changes nothing"
    assert wait_for("the trainers to go", lambda: cluster.trainers() == [], 60)
    filler.unlink()
    for job in (running, waiting):
        cluster.finish(job)
    assert int(cluster.status(running).get("restarts", 0)) == 0, "a full disk is nobody's failure"
    assert len(losses_of(cluster.fetch(running))) == 800, "a step is missing or there twice"


def named_contents(data):
    with sqlite3.connect(data / "ppft.db") as db:
        rows = {row[0] for row in db.execute("SELECT sha256 FROM blobs")}
        return rows, rows | {row[0] for row in db.execute("SELECT sha256 FROM content_refs")}


def test_after_kills_the_files_are_those_that_rows_name(cluster, tiny):
    adopt(cluster, tiny)
    data = cluster.dir / "coordinator"
    job = cluster.submit(make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(32)), training={"max_steps": 200}, checkpoint={"save_steps": 5}))
    for step in (20, 60, 100):
        wait_for(f"step {step}", lambda: cluster.step(job) >= step, every=0.02)
        for victim in [cluster.pid("coordinator"), *cluster.trainers()[:1]]:
            os.kill(victim, signal.SIGKILL)
        cluster.up()
    cluster.finish(job)
    cluster.kill("coordinator")
    # As a crash between a file and its row leaves them.
    planted = []
    for text in (b"of an attempt that was given up", b"of an upload"):
        digest = hashlib.sha256(text).hexdigest()
        planted.append(data / "blobs" / digest[:2] / digest)
        planted[-1].write_bytes(text)
    cluster.up()
    wait_for("the planted files to go", lambda: not any(path.exists() for path in planted), 60)
    cluster.fetch(job)  # what is named is served
    cluster.down()
    files = {path.name for path in (data / "blobs").glob("*/*")}
    rows, named = named_contents(data)
    assert files - named == set(), "files that nothing names"
    assert rows - files == set(), "rows without a file"


def test_a_model_root_that_is_not_there_is_refused(tmp_path):
    for root, word in ((tmp_path / "none", "there is no such folder"), (pathlib.Path(__file__), "is not a folder")):
        done = subprocess.run([BIN / "ppft-coordinator", "--data_dir", tmp_path / "data", "--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0", "--model_root", root],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert f"--model_root {root}: {word}" in done.stderr
        assert not (tmp_path / "data").exists(), "nothing is left half done"


def test_a_store_without_the_folder_of_its_files_is_not_begun_anew(cluster):
    """As when a disk is not mounted: with an empty folder in its place every checkpoint would be lost."""
    cluster.down()
    data = cluster.dir / "coordinator"
    (data / "blobs").rename(cluster.dir / "unmounted")
    (data / "blobs").mkdir()  # where it is mounted
    done = subprocess.run([BIN / "ppft-coordinator", "--data_dir", data, "--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "STORE_UNREADABLE" in done.stderr and "mount the disk" in done.stderr, done.stderr
    assert not any((data / "blobs").iterdir())
    (data / "blobs").rmdir()
    (cluster.dir / "unmounted").rename(data / "blobs")
    cluster.up()


def test_bad_weights_are_told_with_the_users_own_path(cluster, tiny, tmp_path):
    import shutil
    folder = tmp_path / "my model"
    shutil.copytree(tiny.folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    stderr = cluster.ppctl("models", "upload", "mine", folder, expect=2).stderr
    assert f"{weights}: " in stderr
    assert str(cluster.dir / "coordinator") not in stderr
