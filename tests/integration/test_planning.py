"""What the planner decides for a job, seen from the outside."""
import json
import re

import pytest

from service import *


@pytest.fixture(scope="module")
def service(tiny, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("planning"), tiny) as cluster:
        write_rows(cluster.dir / "train.jsonl", short_rows(64))
        yield cluster


def spec_of(service, tiny, **changes):
    return merge(make_spec(tiny, service.dir / "train.jsonl", training={"max_steps": 6, "gradient_accumulation_steps": 2, "warmup_steps": 1}), changes)


def plan(service, spec, *arguments):
    (service.dir / "plan.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return service.ppctl("plan", "plan.yaml", *arguments).stdout


def test_auto_recomputes_nothing_where_everything_fits(service, tiny):
    spec = spec_of(service, tiny, name="auto", parallel={"activation_checkpointing": "auto"})
    shown = plan(service, spec)
    assert "activation checkpointing none" in shown and "bubble predicted" in shown and "\nfits: " in shown
    job = service.submit(spec)
    service.finish(job)
    other = service.submit(spec_of(service, tiny, name="none"))
    service.finish(other)
    assert losses_of(service.fetch(job)) == losses_of(service.fetch(other))
    assert service.status(job)["activation_checkpointing"] == "none"


def test_a_rank_says_what_was_planned_and_what_it_took(service, tiny):
    spec = spec_of(service, tiny, name="memory", parallel={"activation_checkpointing": "full"})
    job = service.submit(spec)
    service.finish(job)
    status = service.status(job)
    assert status["activation_checkpointing"] == "full"
    planned = {int(a.get("rank", 0)): sum(int(part) for part in a["memory"].values()) for a in status["assignment"]}
    told = {int(rank): (int(peak), int(estimate)) for rank, peak, estimate in re.findall(r"rank-(\d+)  memory: (\d+) bytes at the peak, (\d+) planned", service.ppctl("logs", job).stdout)}
    assert planned == {rank: estimate for rank, (_, estimate) in told.items()} and sorted(planned) == [0, 1]
    assert all(peak > 0 for peak, _ in told.values())


def test_what_cannot_fit_starts_nowhere_and_names_what_would(service, tiny):
    """GPipe keeps every micro-batch's activations: 35 TiB, more than any machine has."""
    spec = spec_of(service, tiny, name="large", data={"sample_packing": True, "sequence_len": 256}, parallel={"schedule": "gpipe"},
                   training={"micro_batch_size": 65536, "gradient_accumulation_steps": 256})
    draft = json.loads(plan(service, spec, "-o", "json"))
    assert not draft.get("fits", False)
    found = re.search(r"it would fit with .*training\.micro_batch_size: (\d+)", draft["reason"])
    assert found, draft["reason"]
    assert draft["reason"] in plan(service, spec)
    job = service.submit(spec)
    wait_for("the queue's answer", lambda: service.status(job).get("reason", {}).get("code") == "NO_CAPACITY")
    assert "it would fit with" in service.status(job)["reason"]["message"] and not service.trainers()
    service.ppctl("cancel", job)
    service.finish(job, "CANCELLED")
    smaller = merge(spec, {"training": {"micro_batch_size": int(found[1])}})
    assert json.loads(plan(service, smaller, "-o", "json"))["fits"]
