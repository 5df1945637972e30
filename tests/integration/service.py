"""A cluster of real processes (deploy/local), models to train, and the same training by transformers and PEFT to compare with."""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from small_model import make_small_llama  # noqa: E402

BIN = ROOT / "build" / "bin"
ASSETS = pathlib.Path(os.environ.get("PPFT_ASSETS", ROOT.parent / "shared" / "assets"))
STORIES15M = ROOT / ".deps" / "models" / "stories15M"
DEMO = ROOT / "deploy" / "demo"
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")

torch.set_num_threads(1)  # the cores belong to the trainers


def wait_for(what, check, seconds=300.0, every=0.1):
    """Polls until `check` is true and returns its value. The limit is for hangs, not for speed."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: still not so after {seconds:.0f} s")
        time.sleep(every)


class Cluster:
    """One coordinator and some workers in a folder of their own."""

    def __init__(self, directory, workers, roots):
        self.dir, self.workers, self.roots = pathlib.Path(directory), workers, list(roots)
        self.environment = dict(os.environ)
        self.up()

    def up(self):
        roots = [argument for root in self.roots for argument in ("--model_root", root)]
        done = subprocess.run([ROOT / "deploy" / "local", "up", "--dir", self.dir, "--workers", str(self.workers), "--threads_per_slot", "1", *roots], capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        for line in (self.dir / "env").read_text().splitlines():
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                self.environment[name] = value.strip("'\"")

    def down(self):
        subprocess.run([ROOT / "deploy" / "local", "down", "--dir", self.dir], capture_output=True, timeout=300)

    def logs(self):
        return "".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted((self.dir / "log").glob("*.log")))

    def pid(self, name):
        return int((self.dir / "run" / f"{name}.pid").read_text())

    def kill(self, name, how=signal.SIGKILL):
        os.kill(self.pid(name), how)

    def trainers(self):
        """Pids of this cluster's trainers: children of its agents."""
        agents = {self.pid(f"worker-{index}") for index in range(self.workers)}
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                name, fields = stat.read_text().rsplit(")", 1)
            except OSError:
                continue
            if "ppft-trainer" in name and int(fields.split()[1]) in agents:
                found.append(int(stat.parent.name))
        return found

    def ppctl(self, *arguments, expect=0, timeout=600):
        done = subprocess.run([BIN / "ppctl", *map(str, arguments)], env=self.environment, cwd=self.dir, capture_output=True, text=True, timeout=timeout)
        if expect is not None:
            assert done.returncode == expect, f"ppctl {' '.join(map(str, arguments))}: exit {done.returncode}, expected {expect}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def json(self, *arguments):
        return json.loads(self.ppctl(*arguments, "-o", "json").stdout)

    def status(self, job):
        return self.json("get", job)["status"]

    def state(self, job):
        return self.status(job)["state"].removeprefix("JOB_STATE_")

    def step(self, job):
        return int(self.status(job)["step"])

    def step_now(self, job):
        """As `step`, from the metrics: cheap enough to be asked without a pause. 0 while the coordinator is away or has not heard of a step."""
        try:
            found = re.search(rf'^ppft_job_step{{job="{job}"}} (\S+)$', self.metrics(), re.MULTILINE)
        except OSError:
            return 0
        return int(float(found[1])) if found else 0

    def submit(self, spec, name="job.yaml", *arguments):
        (self.dir / name).write_text(json.dumps(spec, indent=1))  # JSON is YAML
        return self.ppctl("submit", name, "-o", "name", *arguments).stdout.strip()

    def finish(self, job, state="SUCCEEDED", seconds=900):
        end = time.monotonic() + seconds
        while self.state(job) not in ENDED and time.monotonic() < end:
            try:
                self.ppctl("watch", job, expect=None, timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        assert self.state(job) == state, self.ppctl("get", job, "-o", "yaml").stdout[-3000:] + self.ppctl("events", job).stdout[-3000:] + self.logs()

    def fetch(self, job, kind="adapter"):
        out = self.dir / f"{job}-{kind}-{time.monotonic_ns()}"
        self.ppctl("fetch", job, "-o", out, "--type", kind)
        return out

    def metrics(self):
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through a proxy of the environment
        return directly.open(self.environment["PPFT_METRICS"], timeout=60).read().decode()


@pytest.fixture
def cluster(tmp_path, request):
    """Parameters by `cluster_of(workers)`; two workers otherwise."""
    running = Cluster(tmp_path / "cluster", getattr(request, "param", 2), [])
    try:
        yield running
    finally:
        running.down()


@dataclasses.dataclass
class Model:
    name: str
    folder: pathlib.Path
    num_layers: int

    def base(self):
        from transformers import AutoModelForCausalLM
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def tokenizer(self):
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(self.folder)

    def with_adapter(self, folder):
        from peft import PeftModel
        return PeftModel.from_pretrained(self.base(), folder, is_trainable=True)


@contextlib.contextmanager
def serving(directory, model, workers=2):
    """A cluster in `directory` with one registered model, while the block lasts."""
    running = Cluster(pathlib.Path(directory) / "cluster", workers, [model.folder.parent])
    try:
        running.ppctl("models", "register", model.name, model.folder)
        yield running
    finally:
        running.down()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama with random weights and its own tokenizer, made here: grouped-query attention, tied head, five layers."""
    folder = make_small_llama(tmp_path_factory.mktemp("models") / "tiny")
    return Model("tiny", folder, 5)


@pytest.fixture(scope="session")
def stories260k(tiny):
    """Where the test assets are not (PPFT_ASSETS), the random model of the same shape."""
    folder = ASSETS / "models" / "stories260K-hf"
    return Model("stories260K", folder, 5) if folder.exists() else tiny


@pytest.fixture(scope="session")
def stories15m():
    assert STORIES15M.exists(), f"{STORIES15M} is missing: deploy/setup makes it"
    return Model("stories15M", STORIES15M, 6)


def start_adapter(model, folder, r=8, seed=7):
    """A PEFT adapter whose B is not zero: every gradient is alive from the first step."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    adapted = get_peft_model(model.base(), LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(folder)
    return folder


def demo_rows(count=None):
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()]
    return rows if count is None else (rows * (count // len(rows) + 1))[:count]


def short_rows(count):
    """Prompt and completion of a few words each, cut from the demo's stories: quick steps, different lengths."""
    out = []
    for index, row in enumerate(demo_rows(count)):
        words = row["document"].split()
        begin, prompt, answer = index % 5, 3 + index % 6, 4 + index % 9
        out.append({"prompt": " ".join(words[begin:begin + prompt]), "completion": " " + " ".join(words[begin + prompt:begin + prompt + answer])})
    return out


def write_rows(path, rows):
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def merge(base, changes):
    out = dict(base)
    for key, value in changes.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def make_spec(model, train, init_adapter=None, **changes):
    spec = {
        "name": "integration",
        "seed": 3,
        "model": {"base_model": model.name},
        "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {"datasets": [{"path": str(train), "type": "prompt_completion"}], "chat_template": "none", "sequence_len": 64, "sample_packing": False, "shuffle": False},
        "training": {"max_steps": 20, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.004, "lr_scheduler": "cosine", "warmup_steps": 3, "weight_decay": 0.01,
                     "max_grad_norm": 1.0, "logging_steps": 1},
        "precision": {"compute": "fp32"},
        "parallel": {"pipeline_parallel_size": 2, "schedule": "1f1b"},
        "checkpoint": {"save_steps": 10, "save_total_limit": 2},
    }
    if init_adapter is not None:
        spec["model"]["init_adapter"] = str(init_adapter)
    return merge(spec, changes)


def encode(tokenizer, row):
    """ids and labels of a prompt_completion row: the text as the tokenizer makes it, one EOS, labels on the completion."""
    encoded = tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [token if end > begin >= len(row["prompt"]) else -100 for token, (begin, end) in zip(ids, encoded["offset_mapping"])]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def oracle_losses(model, tokenizer, rows, spec):
    """The loss of each step of the same run, by transformers and PEFT in fp32; `model` is trained in place."""
    from transformers import get_cosine_schedule_with_warmup
    training = spec["training"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training["learning_rate"], weight_decay=training["weight_decay"])
    schedule = get_cosine_schedule_with_warmup(optimizer, training["warmup_steps"], training["max_steps"])
    batch = training["micro_batch_size"] * training["gradient_accumulation_steps"]
    assert len(rows) % batch == 0, "whole steps only: the last step of an epoch would be shorter"
    encoded = [encode(tokenizer, row) for row in rows]
    losses = []
    for step in range(training["max_steps"]):
        rows_of_step = [encoded[(step * batch + index) % len(rows)] for index in range(batch)]
        longest = max(len(ids) for ids, _ in rows_of_step)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows_of_step])  # behind its row: a causal model never looks at padding
        labels = torch.tensor([labels[1:] + [-100] * (longest - len(labels)) for _, labels in rows_of_step])
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training["max_grad_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_of(folder):
    return [row["loss"] for row in history(folder) if "loss" in row]


def adapter_digest(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def worst_difference(ours, theirs):
    """(largest relative difference, its step)."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    assert all(map(math.isfinite, ours))
    return max((abs(a - b) / abs(b), step) for step, (a, b) in enumerate(zip(ours, theirs), 1))
