"""Two workers in two network namespaces with different addresses are two hosts: mutual TLS to the coordinator, trainers over the wire between them."""
import shutil

import pytest

from service import *

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
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a pair of network namespaces cannot be had here: {error.stderr.strip()}")
        for index, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"{NETWORK}.{index}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in created:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def certificates(tmp_path):
    """An authority, a certificate for the coordinator's address and one for its callers."""
    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=tmp_path)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", 2, "-subj", "/CN=test authority")
    for name, address in (("server", f"{NETWORK}.1"), ("client", f"{NETWORK}.2")):
        (tmp_path / f"{name}.ext").write_text(f"subjectAltName=IP:{address}\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", 2, "-extfile", f"{name}.ext", "-out", f"{name}.pem")
    return tmp_path


def test_a_pipeline_over_two_hosts(hosts, certificates, tiny, tmp_path):
    processes = []
    server = f"{NETWORK}.1:7070"
    with_tls = dict(os.environ, PPCTL_SERVER=server, PPCTL_TLS_CA=str(certificates / "ca.pem"), PPCTL_TLS_CERT=str(certificates / "client.pem"),
                    PPCTL_TLS_KEY=str(certificates / "client.key"))

    def start(host, name, *command):
        log = open(tmp_path / f"{name}.log", "w+")
        processes.append(subprocess.Popen(["ip", "netns", "exec", host, *map(str, command)], stdout=log, stderr=subprocess.STDOUT))
        return tmp_path / f"{name}.log"

    def ppctl(*arguments, environment=with_tls, expect=0):
        done = subprocess.run(["ip", "netns", "exec", hosts[1], BIN / "ppctl", *map(str, arguments)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == expect, done.stdout + done.stderr + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
        return done.stdout

    try:
        coordinator = [BIN / "ppft-coordinator", "--data_dir", tmp_path / "data", "--listen", server, "--metrics_listen", f"{NETWORK}.1:7071", "--model_root", tiny.folder.parent]
        bare = subprocess.run(["ip", "netns", "exec", hosts[0], *map(str, coordinator)], capture_output=True, text=True, timeout=120)
        assert bare.returncode != 0 and "--tls_cert" in bare.stderr, "an address that others reach needs TLS"
        log = start(hosts[0], "coordinator", *coordinator, "--tls_cert", certificates / "server.pem", "--tls_key", certificates / "server.key", "--tls_client_ca", certificates / "ca.pem")
        wait_for("the coordinator", lambda: "listening on" in log.read_text(), 120)
        for index, host in enumerate(hosts):
            start(host, f"worker-{index}", BIN / "ppft-worker", "--coordinator", server, "--devices", "cpu:1", "--threads_per_slot", 1, "--name", f"worker-{index}", "--work_dir",
                  tmp_path / f"work-{index}", "--metrics_listen", "0.0.0.0:0", "--tls_ca", certificates / "ca.pem", "--tls_cert", certificates / "client.pem", "--tls_key",
                  certificates / "client.key")
        wait_for("both workers", lambda: len(json.loads(ppctl("workers", "list", "-o", "json"))["workers"]) == 2, 120)
        addresses = {worker["address"] for worker in json.loads(ppctl("workers", "list", "-o", "json"))["workers"]}
        assert addresses == {f"{NETWORK}.1", f"{NETWORK}.2"}
        ppctl("list", "--timeout", "3s", environment={name: value for name, value in with_tls.items() if "TLS" not in name}, expect=5)
        ppctl("models", "register", tiny.name, tiny.folder)
        (tmp_path / "job.yaml").write_text(json.dumps(make_spec(tiny, write_rows(tmp_path / "train.jsonl", short_rows(32)), training={"max_steps": 10})))
        ppctl("submit", "job.yaml", "--follow")
        job = json.loads(ppctl("list", "-o", "json"))["jobs"][0]
        assert {entry["worker"] for entry in job["status"]["assignment"]} == {"worker-0", "worker-1"}
        fetch = f"from urllib.request import *; print(build_opener(ProxyHandler({{}})).open('http://{NETWORK}.1:7071/sd', timeout=60).read().decode())"
        groups = json.loads(subprocess.run(["ip", "netns", "exec", hosts[1], sys.executable, "-c", fetch], check=True, capture_output=True, text=True).stdout)
        assert {group["targets"][0].split(":")[0] for group in groups} == addresses
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=120)
