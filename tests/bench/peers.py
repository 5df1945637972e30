"""Starts peer_trainer.py and pipeline_peer.py, listens to them, and ends them when a case takes too long."""
import array
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NEEDS = {"peft": ["peft"], "peft-gc": ["peft"], "compile": ["peft"], "liger": ["peft", "liger_kernel"], "unsloth": ["unsloth"], "unsloth-gc": ["unsloth"]}


def unpack(peers, work):
    """The folder with the peers' packages: `peers` itself, or what tests/bench/pack_peers packed into it."""
    if peers is None or os.path.isdir(peers):
        return peers
    folder = os.path.join(work, "peers")
    if not os.path.isdir(folder):
        with tarfile.open(peers) as tar:
            tar.extractall(folder, filter="data")
    return folder


def missing(which, folder):
    """Why this peer cannot run here, or None."""
    for package in NEEDS[which]:
        if folder is not None and os.path.isdir(os.path.join(folder, package)):
            continue
        if importlib.util.find_spec(package) is None:
            return f"not installed: {package}" + ("" if package == "peft" else "; tests/bench/pack_peers OUT.tar.xz packs it, --peers OUT.tar.xz brings it")
    return None


def version_of(package, folder):
    from importlib import metadata
    found = next(iter(metadata.distributions(name=package, path=[folder])), None) if folder else None
    try:
        return found.version if found else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(work, folder):
    values = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false",
                  UNSLOTH_COMPILE_LOCATION=os.path.join(work, "unsloth_compiled"), PYTHONDONTWRITEBYTECODE="1")
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NVSHMEM_DISABLE_NVLS", "1")):
        values.setdefault(name, value)
    if folder:
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, values.get("PYTHONPATH")]))
    return values


def write_ids(path, documents):
    with open(path, "wb") as f:
        for ids in documents:
            array.array("i", ids).tofile(f)


class PeerProcess:
    """One or more ranks of one program, each given its orders. What any of them reports comes from next()."""

    def __init__(self, program, ranks, log, values):
        self.log, self.processes, self.lines = log, [], queue.Queue()
        for rank in ranks:
            read, write = os.pipe()
            with open(log, "a") as output:
                process = subprocess.Popen([sys.executable, os.path.join(HERE, program)], stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[write],
                                           env=values, start_new_session=True, text=True)
            os.close(write)
            json.dump(dict(rank, report_fd=write), process.stdin)
            process.stdin.close()
            self.processes.append(process)
            threading.Thread(target=self.read, args=[read], daemon=True).start()
        self.open = len(self.processes)

    def read(self, descriptor):
        with os.fdopen(descriptor) as channel:
            for line in channel:
                self.lines.put(json.loads(line))
        self.lines.put(None)  # this rank has closed its end

    def next(self, seconds):
        """The next line; None once every rank has ended or one has failed. Raises queue.Empty after `seconds`."""
        end = time.monotonic() + seconds
        while self.open:
            line = self.lines.get(timeout=max(0.01, end - time.monotonic()))
            if line is not None:
                return line
            self.open -= 1
            time.sleep(0.2)
            if any(process.poll() not in (None, 0) for process in self.processes):
                return None  # the other ranks wait for it in vain
        return None

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()

    def last_words(self):
        with open(self.log, errors="replace") as f:
            lines = [line.strip() for line in f.read().splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-400:]


def run_cases(program, ranks_for, cases, limit_of, log, values):
    """Yields one result a case. A process that dies or is killed is started again for the cases after the one that it was at; `limit_of()`: the seconds that the next may take."""
    left = list(cases)
    while left:
        process = PeerProcess(program, ranks_for(left), log, values)
        try:
            begin, limit = time.monotonic(), limit_of()
            while left:
                try:
                    line = process.next(limit - (time.monotonic() - begin))
                except queue.Empty:
                    yield {"case": left.pop(0)["name"], "killed": f"after the limit of {limit:.0f} s: " + process.last_words()}
                    break
                if line is None:
                    yield {"case": left.pop(0)["name"], "failed": "the process ended: " + process.last_words()}
                    break
                if line.pop("event") == "result":
                    left.pop(0)
                    yield line
                    begin, limit = time.monotonic(), limit_of()
        finally:
            process.kill()
