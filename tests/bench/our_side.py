"""The benches' jobs through the running service: speed, memory and what each rank did with its time, read as any user would."""
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "gpu"))
from bundle_service import Service, ServiceError

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
TRACED_STEPS = 3


class OurSide:
    """A service of its own in the folder `work`, which down() removes. The timelines of its jobs go to the folder `traces`, by default `work`, too."""

    def __init__(self, bundle, work, models, devices, watch, traces=None):
        self.work, self.watch = work, watch
        self.service = Service(bundle, work, models, devices)
        self.traces = traces or work
        self.worker_ready = None  # time.time() when the coordinator listed the worker

    def up(self, model, folder, with_worker=True):
        self.service.start_coordinator()
        begin = time.time()
        self.service.ppctl("models", "register", model, folder)
        self.seconds_to_register = time.time() - begin
        if with_worker:
            self.start_worker()

    def start_worker(self):
        self.worker_started = time.time()
        self.service.start_worker()
        self.worker_ready = time.time()

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

    def phases(self, job):
        """Where the time before the first step went, in seconds, from the job's events and log lines."""
        read = lambda what: [json.loads(line) for line in self.service.ppctl(what, job, "-o", "json").splitlines() if line.strip()]
        moved = {}
        for event in read("events"):
            moved.setdefault(event["to"].replace("JOB_STATE_", ""), seconds_of(event["time"]))
        loads = [float(found.group(1)) for found in (re.search(r"loaded in ([\d.]+) s", line["text"]) for line in read("logs")) if found]
        if not loads or not {"STARTING", "RUNNING"} <= moved.keys() or self.first_step is None:
            return None
        return {"fetch_and_start": round(moved["RUNNING"] - moved["STARTING"] - max(loads), 2), "load": max(loads),
                "first_step": round(self.first_step - moved["RUNNING"], 2)}

    def trace(self, job, name):
        """Asks for a timeline of the next steps: (process, file)."""
        path = os.path.join(self.traces, name + ".trace.json")
        command = [os.path.join(self.service.bin, "ppctl"), "--timeout", "60s", "trace", job, "--steps", str(TRACED_STEPS), "-o", path]
        return subprocess.Popen(command, env=self.service.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), path

    def follow(self, job, spec, warm_up, limit):
        """Waits for the job's end; the figures of its steps after `warm_up`, without those that a timeline was made of."""
        begin, steps = time.time(), spec["training"]["max_steps"]
        first_step = timed_from = last_step = tracing = None
        while True:
            status = self.service.status(job)
            now, step = time.time(), int(status.get("step", 0))
            first_step = first_step or (now if step >= 1 else None)
            last_step = last_step or (now if step >= steps else None)
            if step >= warm_up and timed_from is None:
                timed_from = now
                if steps - step > TRACED_STEPS:
                    tracing = self.trace(job, spec["name"])
            if status["state"] in ENDED:
                break
            if now - begin > limit:
                self.service.ppctl("cancel", job, check=False)
                if tracing:
                    tracing[0].kill()
                return {"killed": f"after the limit of {limit:.0f} s, at step {step} of {steps}"}
            time.sleep(0.01 if first_step is None else 0.1)
        if status["state"] != "SUCCEEDED":
            return {"failed": (status.get("reason") or {}).get("message") or status["state"]}
        self.first_step = first_step
        busy, traced = busy_share(*tracing) if tracing else (None, range(0))
        rows, training = self.service.rows(job), spec["training"]
        full = training["micro_batch_size"] * spec["data"]["sequence_len"] * training["gradient_accumulation_steps"]
        speeds = [float(row["tokens_per_second"]) for row in rows[warm_up:] if int(row["step"]) not in traced]
        seen, supervised = int(status["tokens_seen"]), int(status["supervised_tokens"])
        speed, a_step = statistics.median(speeds), seen / len(rows)
        out = {
            "tokens_per_second": round(speed, 1), "supervised_tokens_per_second": round(speed * supervised / seen, 1), "step_ms": round(1e3 * a_step / speed, 2),
            "steps": len(speeds), "warm_up": warm_up, "tokens_per_step": round(a_step, 1), "micro_batch_fill": round(a_step / full, 4),
            "first_loss": round(rows[0]["loss"], 5), "last_loss": round(rows[-1]["loss"], 5), "submit_to_first_step_s": round(first_step - begin, 2),
            "busy_share": busy, "layers": [stage.get("layers") for stage in status.get("assignment", [])],
        }
        peaks = [[round(bytes_ / 2**30, 2) for bytes_ in peak] for peak in self.service.device_peaks(job)]
        if peaks:
            out["peak_gib"] = {"allocated": [held for _, held in peaks], "reserved": [reserved for reserved, _ in peaks]}
        out.update(self.watch.figures(timed_from, last_step or time.time(), out.get("peak_gib", {})))
        return out


def seconds_of(text):
    """Of a timestamp of the service, as time.time() counts; it may have more digits than Python reads."""
    whole, _, digits = text.rstrip("Z").partition(".")
    return datetime.datetime.fromisoformat(whole + "+00:00").timestamp() + float("0." + (digits or "0"))


def busy_share(process, path):
    """({"times": "device" or "host", rank: {kind: share of its time}}, steps that were traced) from a timeline; (None, no steps) if there is none."""
    try:
        if process.wait(60) != 0:
            return None, range(0)
        with open(path) as f:
            trace = json.load(f)
    except (subprocess.TimeoutExpired, OSError, ValueError):
        process.kill()
        return None, range(0)
    about, shares = trace["otherData"], {}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for rank in sorted({span["pid"] for span in spans}):
        mine = [span for span in spans if span["pid"] == rank]
        steps = [span for span in mine if span["cat"] == "steps"]
        whole = max(span["ts"] + span["dur"] for span in steps) - min(span["ts"] for span in steps)
        kinds = {}
        for span in mine:
            action = re.match(r"\d+([FB])\d+$", span["name"])
            kind = ("forward" if action.group(1) == "F" else "backward") if action else span["cat"]
            if kind != "steps":
                kinds[kind] = kinds.get(kind, 0.0) + span["dur"]
        kinds["rest"] = max(0.0, whole - sum(kinds.values()))
        shares[f"stage {rank}"] = {kind: round(span / whole, 3) for kind, span in kinds.items()}
    return {"times": about.get("times"), **shares}, range(int(about["first_step"]), int(about["last_step"]) + 1)
