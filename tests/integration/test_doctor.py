"""ppctl doctor against a real cluster: all well, a lost worker, a worker without its devices, files that are gone."""
import shutil
import subprocess

import pytest

from service import *


@pytest.fixture
def models(tmp_path, tiny):
    shutil.copytree(tiny.folder, tmp_path / "models" / "tiny")
    return tmp_path / "models"


def checks(cluster, expect):
    return json.loads(cluster.ppctl("doctor", "-o", "json", expect=expect).stdout)["checks"]


def failed(cluster):
    return {entry["check"]: entry for entry in checks(cluster, 1) if entry["level"] == "fail"}


def test_doctor_names_what_is_wrong_and_what_to_do(cluster, models, tiny):
    cluster.roots = [models]
    cluster.down()
    cluster.up()
    cluster.ppctl("models", "register", "tiny", models / "tiny")
    dataset = cluster.ppctl("data", "upload", write_rows(cluster.dir / "train.jsonl", short_rows(8)), "-o", "name").stdout.strip()

    well = checks(cluster, 0)
    assert {"coordinator", "tls", "clock", "disk", "worker worker-0", "worker worker-1", "files"} <= {entry["check"] for entry in well}
    assert not [entry for entry in well if entry["level"] == "fail"]
    text = cluster.ppctl("doctor", "--contents").stdout
    assert "1 model and 1 dataset are unchanged" in text and "LibTorch 2." in text and "thread" in text
    assert "thread" in cluster.ppctl("workers", "list").stdout
    worker = cluster.json("workers", "list")["workers"][0]
    assert worker["host"]["network_interface"] and int(worker["host"]["memory_bytes"]) > 0 and int(worker["disk_free_bytes"]) > 0
    wait_for("the clocks to be compared", lambda: all(w.get("clock") for w in cluster.json("workers", "list")["workers"]))
    assert all(int(w["clock"]["offset_nanos"]) == 0 for w in cluster.json("workers", "list")["workers"]), "one host has one clock"

    cluster.kill("worker-1")
    wait_for("the loss to show", lambda: any(w["state"] == "lost" for w in cluster.json("workers", "list")["workers"]))
    lost = failed(cluster)
    assert set(lost) == {"worker worker-1"}
    assert "lost" in lost["worker worker-1"]["message"] and "ppft-worker" in lost["worker worker-1"]["remedy"]
    text = cluster.ppctl("doctor", expect=1)
    assert "fail  worker worker-1: lost" in text.stdout and "what to do: look whether ppft-worker runs" in text.stdout and "1 failed" in text.stderr

    cluster.up()
    checks(cluster, 0)
    (models / "tiny" / "model.safetensors").write_bytes((models / "tiny" / "model.safetensors").read_bytes()[:-1000])
    [blob] = [path for path in cluster.dir.rglob("blobs/*/*") if path.name.startswith(dataset.removeprefix("ds-"))]
    blob.unlink()
    damaged = failed(cluster)
    assert set(damaged) == {"model tiny", f"dataset {dataset}"}
    assert "shorter than it was" in damaged["model tiny"]["message"] and "ppctl data upload" in damaged[f"dataset {dataset}"]["remedy"]

    cluster.kill("coordinator")
    gone = cluster.ppctl("doctor", expect=5)
    assert gone.stdout.startswith("fail  coordinator: cannot reach")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_a_worker_without_its_devices_says_why(cluster):
    out = cluster.dir / "gpu-worker.log"
    with open(out, "w") as log:
        worker = subprocess.Popen([BIN / "ppft-worker", "--coordinator", cluster.environment["PPCTL_SERVER"], "--name", "gpu", "--devices", "cuda:all", "--work_dir", cluster.dir / "gpu-worker"],
                                  stdout=log, stderr=subprocess.STDOUT)
    try:
        row = wait_for("the worker to show", lambda: next((w for w in cluster.json("workers", "list")["workers"] if w["name"] == "gpu"), None))
        assert row["state"] == "unusable" and len(row["problems"]) == 1 and row["problems"][0].startswith("--devices cuda:all: ")
        assert f"gpu: {row['problems'][0]}" in cluster.ppctl("workers", "list").stdout
        problem = failed(cluster)["worker gpu"]
        assert problem["message"] == row["problems"][0] and problem["remedy"]
        assert row["problems"][0] in out.read_text()
    finally:
        worker.terminate()
        assert worker.wait(timeout=120) == 0
