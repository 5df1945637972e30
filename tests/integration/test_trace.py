"""ppctl trace: what each rank of a job does in some steps, as a Chrome trace."""
import collections
import subprocess

import pytest

from service import *

ACTIONS = ("compute", "sends", "receives")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny):
    with serving(tmp_path_factory.mktemp("trace"), tiny) as running:
        yield running


def long_job(cluster, model, **changes):
    """Whole steps only: every micro-batch has rows. Evaluates and saves every second step."""
    train = write_rows(cluster.dir / "train.jsonl", short_rows(64))
    test = write_rows(cluster.dir / "test.jsonl", short_rows(6))
    spec = make_spec(model, train, data={"test_datasets": [{"path": test, "type": "prompt_completion"}]}, training={"max_steps": 20000, "warmup_steps": 1},
                     evaluation={"eval_steps": 2, "eval_on_start": False}, checkpoint={"save_steps": 2})
    return merge(spec, changes)


def programs(cluster, spec):
    """Each rank's actions of one step, as the plan has them."""
    (cluster.dir / "plan.yaml").write_text(json.dumps(spec))
    plan = cluster.json("plan", "plan.yaml")["plan"]
    return {rank["rank"]: rank["program"].split() for rank in plan["ranks"]}


def spans(trace, **wanted):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and all(event[key] == value for key, value in wanted.items())]


def check(trace, expected, steps):
    named = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert set(named) == set(expected)
    first, last = trace["otherData"]["first_step"], trace["otherData"]["last_step"]
    assert last - first + 1 == steps
    for rank, program in expected.items():
        for step in range(first, last + 1):
            done = [event["name"] for event in spans(trace, pid=rank) if event["cat"] in ACTIONS and event["args"]["step"] == step and "evaluation" not in event["args"]]
            assert collections.Counter(done) == collections.Counter(program), f"rank {rank}, step {step}"
        for row in ACTIONS:
            ordered = sorted(spans(trace, pid=rank, cat=row), key=lambda event: event["ts"])
            assert all(a["ts"] + a["dur"] <= b["ts"] + 0.001 for a, b in zip(ordered, ordered[1:])), f"rank {rank}: spans of {row} overlap"
        assert len(spans(trace, pid=rank, cat="optimizer")) == steps
        assert len(spans(trace, pid=rank, cat="steps")) == steps
        assert spans(trace, pid=rank, cat="collectives")
    return first, last


def test_every_action_of_the_schedule_is_there_once(cluster, tiny):
    spec = long_job(cluster, tiny)
    expected = programs(cluster, spec)
    job = cluster.submit(spec)
    wait_for("some steps", lambda: cluster.step(job) > 3, every=0.05)
    done = cluster.ppctl("trace", job, "--steps", "4", "-o", "trace.json")
    trace = json.loads((cluster.dir / "trace.json").read_text())
    first, last = check(trace, expected, 4)
    assert done.stdout == "" and "ui.perfetto.dev" in done.stderr and f"steps {first} to {last}" in done.stderr
    for rank in expected:
        assert len(spans(trace, pid=rank, cat="evaluation")) == 2
        assert len(spans(trace, pid=rank, cat="checkpoint")) == 2
        assert {event["name"] for event in spans(trace, pid=rank) if event["args"].get("evaluation")} >= {f"{rank}F0"}
    # Each message has its arrow, and comes after it was sent: one host, one clock.
    starts = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == 4 * sum(name.split("SEND")[0] != name for program in expected.values() for name in program)
    assert all(starts[key]["ts"] <= ends[key]["ts"] and starts[key]["pid"] != ends[key]["pid"] for key in starts)
    # A second one works, also to standard output; the job goes on.
    again = json.loads(cluster.ppctl("trace", job, "--steps", "1", "-o", "-").stdout)
    assert check(again, expected, 1)[0] > last
    step = cluster.step(job)
    wait_for("further steps", lambda: cluster.step(job) > step + 3, every=0.05)
    cluster.ppctl("cancel", job)
    cluster.finish(job, "CANCELLED")
    assert cluster.ppctl("trace", job, expect=7).stderr.count("no step left to trace") == 1
    cluster.ppctl("trace", "job-00000000", expect=3)


def test_virtual_stages_and_recovery(cluster, tiny):
    spec = long_job(cluster, tiny, parallel={"schedule": "interleaved_1f1b", "virtual_stages": 2})
    expected = programs(cluster, spec)
    job = cluster.submit(spec)
    wait_for("a checkpoint", lambda: int(cluster.status(job).get("checkpoint_step", 0)) > 0, every=0.05)
    running = subprocess.Popen([BIN / "ppctl", "trace", job, "--steps", "100", "-o", "long.json"], env=cluster.environment, cwd=cluster.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "tracing 100 steps" in running.stderr.readline()
    os.kill(cluster.trainers()[0], signal.SIGKILL)
    output = running.communicate(timeout=300)
    assert running.returncode == 0, output
    check(json.loads((cluster.dir / "long.json").read_text()), expected, 100)
    cluster.ppctl("cancel", job)
    cluster.finish(job, "CANCELLED")


def test_a_waiting_job_is_traced_from_its_first_step(cluster, tiny):
    before = cluster.submit(long_job(cluster, tiny))
    spec = long_job(cluster, tiny, training={"max_steps": 3})
    expected = programs(cluster, spec)
    job = cluster.submit(spec)
    wait_for("it to wait", lambda: cluster.state(job) == "QUEUED", every=0.05)
    # More steps than it has: the trace ends with the job's last one.
    running = subprocess.Popen([BIN / "ppctl", "trace", job, "--steps", "5", "-o", "first.json"], env=cluster.environment, cwd=cluster.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "tracing 5 steps" in running.stderr.readline()
    cluster.ppctl("cancel", before)
    output = running.communicate(timeout=300)
    assert running.returncode == 0, output
    assert check(json.loads((cluster.dir / "first.json").read_text()), expected, 3) == (1, 3)
    cluster.finish(job)
