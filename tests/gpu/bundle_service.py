"""A coordinator and one worker on this machine, started from a bundle's programs (deploy/bundle) or from build/, and asked through ppctl."""
import json
import os
import re
import subprocess
import time


class ServiceError(Exception):
    """The service did not do what was asked of it; the text is for people."""


class Service:
    """Ended by down(). `folder` holds bin/; everything that the service writes lies below `work`."""

    def __init__(self, folder, work, models, devices, deterministic=False, second_worker=""):
        """`second_worker`: what CUDA_VISIBLE_DEVICES is for a second worker on this machine, e.g. "1,0": the same two GPUs, the other way round."""
        self.bin, self.work, self.models, self.devices, self.deterministic = os.path.join(folder, "bin"), work, models, devices, deterministic
        self.worker, self.second_worker = None, second_worker
        self.processes, self.environment = [], dict(os.environ)
        # NVLink multicast stays off: on shared machines it can put the host's GPUs out of service.
        for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NVSHMEM_DISABLE_NVLS", "1")):
            self.environment.setdefault(name, value)

    def start(self, name, command, **environment):
        with open(os.path.join(self.work, name + ".log"), "w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=dict(self.environment, **environment), text=True)
        self.processes.append(process)
        return process

    def start_coordinator(self):
        coordinator = self.start("coordinator", [f"{self.bin}/ppft-coordinator", "--data_dir", f"{self.work}/data", "--listen", "127.0.0.1:0",
                                                 "--metrics_listen", "127.0.0.1:0", "--model_root", self.models])
        line = coordinator.stdout.readline()
        address = re.search(r"listening on (\S+)", line)
        if not address:
            raise ServiceError(f"the coordinator said {line!r}: " + tail(f"{self.work}/coordinator.log"))
        self.environment["PPCTL_SERVER"] = address.group(1)

    def start_worker(self):
        """Returns when the coordinator lists the workers' devices: the list of workers."""
        self.worker = self.start("worker", self.worker_command("bench", "worker"))
        if self.second_worker:
            self.start("worker-2", self.worker_command("bench-2", "worker-2"), CUDA_VISIBLE_DEVICES=self.second_worker)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if self.worker.poll() is not None:
                raise ServiceError("the worker ended: " + tail(f"{self.work}/worker.log"))
            workers = self.workers()
            if sum(1 for worker in workers if worker.get("devices")) == (2 if self.second_worker else 1):
                return workers
            time.sleep(0.05)
        raise ServiceError("the worker did not come up: " + tail(f"{self.work}/worker.log"))

    def worker_command(self, name, folder):
        return [f"{self.bin}/ppft-worker", "--coordinator", self.environment["PPCTL_SERVER"], "--devices", self.devices, "--name", name, "--work_dir",
                f"{self.work}/{folder}", "--metrics_listen", "127.0.0.1:0", *(["--deterministic"] if self.deterministic else [])]

    def up(self):
        self.start_coordinator()
        return self.start_worker()

    def down(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes, self.worker = [], None

    def ppctl(self, *words, check=True):
        done = subprocess.run([f"{self.bin}/ppctl", "--timeout", "600s", *words], env=self.environment, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise ServiceError(f"ppctl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def workers(self):
        return json.loads(self.ppctl("workers", "list", "-o", "json") or "{}").get("workers", [])

    def status(self, job):
        """The job's status; its state without the prefix of the contract."""
        status = json.loads(self.ppctl("get", job, "-o", "json"))["status"]
        status["state"] = status["state"].replace("JOB_STATE_", "")
        return status

    def rows(self, job):
        """The job's history: a row for each optimizer step."""
        found = json.loads(self.ppctl("metrics", job, "-o", "json", check=False) or "{}")
        return [row for row in found.get("rows", []) if "loss" in row]

    def peak_bytes(self, job):
        """What each rank on a GPU reserved there at most, as its trainer says at the end."""
        return [reserved for reserved, _ in self.device_peaks(job)]

    def device_peaks(self, job):
        """For each rank on a GPU what it reserved at most, and what its tensors held at most."""
        found = re.findall(r"device memory: (\d+) bytes at the peak.* tensors held (\d+)", self.ppctl("logs", job, check=False))
        return [(int(reserved), int(held)) for reserved, held in found]

    def memory(self, job):
        """By rank: the plan's estimate and the peak that the trainer measured. On a GPU without what does not pass through LibTorch's allocator, which is
        told beside it (context and NCCL, planned and found)."""
        line = re.compile(r"rank-(\d+) .*memory: (\d+) bytes at the peak, (\d+) planned(?:; (-?\d+) bytes outside of the allocator, (\d+) planned)?")
        ranks = {}
        for rank, peak, planned, outside, planned_outside in line.findall(self.ppctl("logs", job, check=False)):
            found = {"rank": int(rank), "planned_bytes": int(planned), "peak_bytes": int(peak), "ratio": round(int(planned) / max(1, int(peak)), 3)}
            if outside:
                found.update(outside_bytes=int(outside), planned_outside_bytes=int(planned_outside))
            ranks[int(rank)] = found
        return [ranks[rank] for rank in sorted(ranks)]

    def trainers(self):
        """Process ids of the trainers that run now."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat") as f:
                    stat = f.read()
                name, parent = stat[stat.index("(") + 1:stat.rindex(")")], int(stat[stat.rindex(")") + 2:].split()[1])
            except OSError:
                continue
            if self.worker is not None and parent == self.worker.pid and name.startswith("ppft-trainer"):
                found.append(int(pid))
        return sorted(found)


def tail(path, lines=5):
    with open(path, errors="replace") as f:
        return " | ".join(f.read().splitlines()[-lines:])
