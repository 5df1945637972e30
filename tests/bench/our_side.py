"""The benches' jobs through the running service: speed, memory and the trainers' time by kind, read as any user would."""
import json
import os
import re
import shutil
import statistics
import sys
import time
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "gpu"))
from bundle_service import Service, ServiceError

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
BUSY = re.compile(r'^ppft_stage_busy_seconds_total\{(.*)\} (\S+)$', re.M)


class OurSide:
    """A service of its own in the folder `work`, which down() removes."""

    def __init__(self, bundle, work, models, devices, watch):
        self.work, self.watch = work, watch
        self.service = Service(bundle, work, models, devices)
        self.worker_ready = None  # time.time() when the coordinator listed the worker
        self.metrics_address = None

    def up(self, model, folder, with_worker=True):
        self.service.start_coordinator()
        begin = time.time()
        self.service.ppctl("models", "register", model, folder)
        self.seconds_to_register = time.time() - begin
        if with_worker:
            self.start_worker()

    def start_worker(self):
        self.worker_started = time.time()
        workers = self.service.start_worker()
        self.worker_ready = time.time()
        self.metrics_address = workers[0].get("metrics_address", "")
        return workers

    def down(self):
        self.service.down()
        shutil.rmtree(self.work, ignore_errors=True)

    def submit(self, spec):
        path = os.path.join(self.work, spec["name"] + ".yaml")
        with open(path, "w") as f:
            json.dump(spec, f, indent=1)  # JSON is YAML
        return self.service.ppctl("submit", path, "-o", "name").strip().splitlines()[-1]

    def await_queued(self, job, deadline):
        """Until its rows are tokens and only a device is missing."""
        while self.service.status(job)["state"] not in ("QUEUED", *ENDED):
            if time.monotonic() > deadline:
                raise ServiceError(f"{job} does not reach QUEUED")
            time.sleep(0.02)

    def busy_seconds(self, job):
        """{stage: {kind: seconds so far}} as the worker's /metrics has it."""
        try:
            text = urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=5).read().decode()
        except OSError:
            return {}
        found = {}
        for labels, value in BUSY.findall(text):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if labels.get("job") == job:
                found.setdefault(labels["stage"], {})[labels["kind"]] = float(value)
        return found

    def follow(self, job, spec, warm_up, limit):
        """Waits for the job's end; the figures of its steps after `warm_up`."""
        begin, steps = time.time(), spec["training"]["max_steps"]
        first_step = timed_from = last_step = None
        busy = []
        while True:
            status = self.service.status(job)
            now, step = time.time(), int(status.get("step", 0))
            if step >= 1 and first_step is None:
                first_step = now
            if step >= warm_up and timed_from is None:
                timed_from = now
            if step >= steps and last_step is None:
                last_step = now
            if status["state"] in ENDED:
                break
            if now - begin > limit:
                self.service.ppctl("cancel", job, check=False)
                return {"killed": f"after the limit of {limit:.0f} s, at step {step} of {steps}"}
            if first_step is not None:
                if step < steps:
                    busy.append(self.busy_seconds(job))
                time.sleep(0.2)
            else:
                time.sleep(0.01)
        if status["state"] != "SUCCEEDED":
            return {"failed": (status.get("reason") or {}).get("message") or status["state"]}
        rows = self.service.rows(job)
        training = spec["training"]
        tokens = training["micro_batch_size"] * spec["data"]["sequence_len"] * training["gradient_accumulation_steps"]
        speeds = [float(row["tokens_per_second"]) for row in rows[warm_up:] if row.get("tokens_per_second")]
        seen, supervised = int(status["tokens_seen"]), int(status["supervised_tokens"])
        speed = statistics.median(speeds)
        out = {
            "tokens_per_second": round(speed, 1), "supervised_tokens_per_second": round(speed * supervised / seen, 1),
            "step_ms": round(1e3 * seen / len(rows) / speed, 2), "steps": len(speeds), "warm_up": warm_up, "tokens_per_step": round(seen / len(rows), 1),
            "micro_batch_fill": round(seen / len(rows) / tokens, 4), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
            "submit_to_first_step_s": round(first_step - begin, 2) if first_step else None, "busy_share": share_of_kinds(busy),
        }
        peaks = self.service.peak_bytes(job)
        if peaks:
            out["peak_gib"] = {"trainer": [round(peak / 2**30, 2) for peak in peaks]}
        end = last_step or time.time()
        if self.watch.samples:
            out["gpu_busy"] = self.watch.busy_share(timed_from or begin, end)
            device = self.watch.peak_bytes(begin, end)
            if device:
                out.setdefault("peak_gib", {})["device"] = [round(peak / 2**30, 2) for peak in device]
        if status.get("assignment"):
            out["layers"] = [stage.get("layers") for stage in status["assignment"]]
        self.first_step = first_step
        return out


def share_of_kinds(samples):
    """Between the first and the last sample: {stage: {kind: share of the trainer's thread}}."""
    samples = [sample for sample in samples if sample]
    if len(samples) < 2:
        return None
    out = {}
    for stage, last in samples[-1].items():
        first = samples[0].get(stage, {})
        grown = {kind: seconds - first.get(kind, 0.0) for kind, seconds in last.items()}
        total = sum(grown.values())
        if total > 0:
            out[stage] = {kind: round(seconds / total, 3) for kind, seconds in sorted(grown.items()) if seconds / total >= 0.0005}
    return out or None
