"""More jobs than devices, cancel in every state, identical requests."""
import pytest

from service import *


@pytest.fixture(scope="module")
def service(tiny, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("queue"), tiny) as cluster:
        write_rows(cluster.dir / "train.jsonl", short_rows(64))
        yield cluster


def spec_of(service, tiny, steps, **changes):
    return make_spec(tiny, service.dir / "train.jsonl", training={"max_steps": steps, "gradient_accumulation_steps": 2, "warmup_steps": 1}, **changes)


def test_a_second_job_waits_for_the_slots_of_the_first_and_then_runs(service, tiny):
    first = service.submit(spec_of(service, tiny, 50000, name="first"))
    wait_for("the first to run", lambda: service.state(first) == "RUNNING", every=0.02)
    second = service.submit(spec_of(service, tiny, 20, name="second"))
    waiting = wait_for("the second to have a place", lambda: (status := service.status(second))["state"].endswith("QUEUED") and int(status["queue_position"]) > 0 and status, every=0.02)
    assert int(waiting["queue_position"]) == 1
    assert "device" in waiting["reason"]["message"]
    service.ppctl("cancel", first)
    service.finish(first, "CANCELLED")
    service.finish(second)


def test_a_higher_priority_goes_first(service, tiny):
    running = service.submit(spec_of(service, tiny, 50000, name="running"))
    wait_for("it to run", lambda: service.state(running) == "RUNNING", every=0.02)
    low = service.submit(spec_of(service, tiny, 5, name="low", priority=10))
    high = service.submit(spec_of(service, tiny, 5, name="high", priority=90))
    wait_for("both to wait", lambda: {service.state(low), service.state(high)} == {"QUEUED"})
    service.ppctl("cancel", running)
    service.finish(running, "CANCELLED")
    for job in (low, high):
        service.finish(job)
    started = {job: service.json("get", job)["start_time"] for job in (low, high)}
    assert started[high] < started[low]


def test_a_job_for_more_devices_than_there_are_says_so_and_lets_others_pass(service, tiny):
    big = service.submit(merge(spec_of(service, tiny, 5, name="big"), {"parallel": {"pipeline_parallel_size": 4}, "training": {"gradient_accumulation_steps": 4}}))
    wait_for("the queue", lambda: service.state(big) == "QUEUED")
    small = service.submit(spec_of(service, tiny, 5, name="small", parallel={"pipeline_parallel_size": 1}))
    service.finish(small)
    status = service.status(big)
    assert status["reason"]["code"] == "NO_CAPACITY" and "4" in status["reason"]["message"] and "2" in status["reason"]["message"]
    service.ppctl("cancel", big)
    service.finish(big, "CANCELLED")


def test_cancel_in_every_state_frees_the_devices(service, tiny):
    """Cancelled right after submit, while queued, while running, and again after the end."""
    preparing = service.submit(spec_of(service, tiny, 5000, name="preparing"))
    service.ppctl("cancel", preparing)
    service.finish(preparing, "CANCELLED")

    running = service.submit(spec_of(service, tiny, 50000, name="running"))
    queued = service.submit(spec_of(service, tiny, 50000, name="queued"))
    wait_for("it to run", lambda: service.state(running) == "RUNNING", every=0.02)
    wait_for("the other to wait", lambda: service.state(queued) == "QUEUED", every=0.02)
    service.ppctl("cancel", queued)
    service.finish(queued, "CANCELLED")
    service.ppctl("cancel", running)
    service.finish(running, "CANCELLED")
    assert service.trainers() == [] or wait_for("the trainers to go", lambda: service.trainers() == [], 120)

    starting = service.submit(spec_of(service, tiny, 50000, name="starting"))
    wait_for("it to leave the queue", lambda: service.state(starting) in ("STARTING", "RUNNING"), every=0.005)
    service.ppctl("cancel", starting)
    service.finish(starting, "CANCELLED")

    after = service.submit(spec_of(service, tiny, 3, name="after"))
    service.finish(after)
    assert service.ppctl("cancel", after, expect=None).returncode in (0, 7)
    assert service.state(after) == "SUCCEEDED", "a terminal state absorbs"
    assert service.ppctl("watch", running, expect=8)
    assert service.ppctl("watch", after, expect=0)


def test_the_same_request_is_the_same_job_and_another_spec_is_refused(service, tiny):
    spec = spec_of(service, tiny, 3, name="once")
    ids = {service.submit(spec, "once.yaml", "--request-id", "the-same") for _ in range(3)}
    assert len(ids) == 1
    (service.dir / "other.yaml").write_text(json.dumps(merge(spec, {"seed": 9})))
    assert "the-same" in service.ppctl("submit", "other.yaml", "--request-id", "the-same", expect=7).stderr
    service.finish(ids.pop())


def test_follow_ends_with_the_job_and_events_tell_its_road(service, tiny):
    (service.dir / "follow.yaml").write_text(json.dumps(spec_of(service, tiny, 10, name="follow")))
    done = service.ppctl("submit", "follow.yaml", "--follow")
    job = next(entry["id"] for entry in service.json("list")["jobs"] if entry["name"] == "follow")
    assert job in done.stdout
    events = service.ppctl("events", job).stdout
    order = [events.index(word) for word in ("PREPARING", "QUEUED", "STARTING", "RUNNING", "EXPORTING", "SUCCEEDED")]
    assert order == sorted(order)
    assert service.ppctl("logs", job).stdout.strip()
    rows = service.json("metrics", job)["rows"]
    assert [int(row["step"]) for row in rows if row.get("loss") is not None] == list(range(1, 11))


def test_metrics_are_clean_and_prometheus_understands_them(service, tiny):
    job = service.submit(spec_of(service, tiny, 50000, name="metrics"))
    wait_for("steps", lambda: service.step(job) > 5, every=0.05)
    text = service.metrics()
    for name in ("ppft_job_state", "ppft_job_step", "ppft_job_loss", "ppft_job_tokens_total", "ppft_job_tokens_per_second", "ppft_queue_depth", "ppft_workers", "ppft_rpc_requests_total",
                 "ppft_rpc_duration_seconds_bucket", "ppft_store_commit_seconds_bucket", "ppft_build_info"):
        assert f"\n{name}{{" in text or f"\n{name} " in text, f"no {name}"
    lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    service.ppctl("cancel", job)
    service.finish(job, "CANCELLED")
