"""Two workers in two network namespaces with different addresses are two hosts: trainers reach each other over the wire between them."""
import shutil

import pytest

from conftest import *

NETWORK = "10.213.7"


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """A bridge and two namespaces: the coordinator at .1 in the first, workers at .1 and .2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ppft-{os.getpid()}-a", f"ppft-{os.getpid()}-b"]
    created = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                created.append(name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for index, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{index}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in created:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_pipeline_over_two_hosts(hosts, tiny, tmp_path):
    processes = []

    def start(host, name, *command):
        log = open(tmp_path / f"{name}.log", "w+")
        processes.append(subprocess.Popen(["ip", "netns", "exec", host, *map(str, command)], stdout=log, stderr=subprocess.STDOUT))
        return tmp_path / f"{name}.log"

    def ppctl(*arguments):
        done = subprocess.run(["ip", "netns", "exec", hosts[0], BIN / "ppctl", *map(str, arguments)], env=dict(os.environ, PPCTL_SERVER="127.0.0.1:7070"), cwd=tmp_path, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
        return done.stdout

    try:
        # The coordinator listens on loopback alone; a forwarder on the wire stands for the operator's secured way in.
        log = start(hosts[0], "coordinator", BIN / "ppft-coordinator", "--data_dir", tmp_path / "data", "--listen", "127.0.0.1:7070", "--metrics_listen", "127.0.0.1:7071", "--model_root",
                    tiny.folder.parent)
        wait_for("the coordinator", lambda: "listening on" in log.read_text(), 60)
        start(hosts[0], "forwarder", sys.executable, pathlib.Path(__file__).with_name("forward_port.py"), f"{NETWORK}.1", 7070)
        for index, host in enumerate(hosts):
            start(host, f"worker-{index}", BIN / "ppft-worker", "--coordinator", f"{NETWORK}.1:7070", "--devices", "cpu:1", "--threads_per_slot", 1, "--name", f"worker-{index}", "--work_dir",
                  tmp_path / f"work-{index}")
        wait_for("both workers", lambda: len(json.loads(ppctl("workers", "list", "-o", "json"))["workers"]) == 2, 60)
        addresses = {worker["address"] for worker in json.loads(ppctl("workers", "list", "-o", "json"))["workers"]}
        assert addresses == {f"{NETWORK}.1", f"{NETWORK}.2"}
        ppctl("models", "register", tiny.name, tiny.folder)
        (tmp_path / "job.yaml").write_text(json.dumps(make_spec(tiny, write_rows(tmp_path / "train.jsonl", short_rows(32)), training={"max_steps": 10})))
        ppctl("submit", "job.yaml", "--follow")
        job = json.loads(ppctl("list", "-o", "json"))["jobs"][0]
        assert {entry["worker"] for entry in job["status"]["assignment"]} == {"worker-0", "worker-1"}
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)
