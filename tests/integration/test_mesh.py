"""Replicas x stages x ZeRO, recomputation and narrow types through the service: the same curve in every layout."""
import contextlib

import pytest
import torch

from service import *

STEPS = 12
EFFECTIVE = 8  # micro-batches of all replicas per step


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny):
    with serving(tmp_path_factory.mktemp("mesh"), tiny, workers=4) as running:
        yield running


@pytest.fixture(scope="module")
def plain(cluster, tiny):
    """The spec of one rank, and its losses and events."""
    adapter = start_adapter(tiny, cluster.dir / "adapter")
    # Not a multiple of the batch: the epoch's last step leaves some replicas without rows.
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(53)), adapter, training={"max_steps": STEPS, "gradient_accumulation_steps": EFFECTIVE, "warmup_steps": 2},
                     parallel={"pipeline_parallel_size": 1}, output={"formats": ["adapter", "merged"]})
    return spec, run(cluster, spec)[1]


def run(cluster, spec):
    job = cluster.submit(spec)
    cluster.finish(job)
    return job, losses_of(cluster.fetch(job))


def laid_out(spec, dp, pp, zero, **changes):
    return merge(spec, {"parallel": {"data_parallel_size": dp, "pipeline_parallel_size": pp, "zero_stage": zero}, "training": {"gradient_accumulation_steps": EFFECTIVE // dp}, **changes})


@pytest.mark.parametrize("dp, pp, zero", [(2, 1, 0), (2, 2, 1), (4, 1, 2), (2, 2, 3)])
def test_every_mesh_gives_the_same_curve(cluster, tiny, plain, dp, pp, zero):
    spec, losses = plain
    job, ours = run(cluster, laid_out(spec, dp, pp, zero))
    assert worst_difference(ours, losses)[0] <= 1e-4
    assignment = cluster.status(job)["assignment"]
    assert sorted((int(a.get("replica", 0)), int(a.get("stage", 0))) for a in assignment) == [(replica, stage) for replica in range(dp) for stage in range(pp)]
    from transformers import AutoModelForCausalLM
    probe = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(cluster.fetch(job, "merged"), dtype=torch.float32)(input_ids=probe).logits
        adapted = tiny.with_adapter(cluster.fetch(job)).eval()(input_ids=probe).logits
    assert (merged - adapted).abs().max() <= 1e-3 * adapted.abs().max()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_loss(cluster, plain, mode):
    spec, losses = plain
    assert run(cluster, merge(spec, {"parallel": {"activation_checkpointing": mode}}))[1] == losses


def test_a_job_goes_on_in_its_mesh_after_a_kill(cluster, plain):
    spec = laid_out(plain[0], 2, 2, 3, training={"max_steps": 150, "gradient_accumulation_steps": EFFECTIVE // 2})
    _, undisturbed = run(cluster, spec)
    for _ in range(10):  # again where the machine was busy with other things until the job was over
        job = cluster.submit(spec)
        wait_for("a checkpoint", lambda: int(cluster.status(job).get("checkpoint_step", 0)) >= 10, every=0.02)
        for trainer in cluster.trainers()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer, signal.SIGKILL)
        cluster.finish(job)
        if int(cluster.status(job)["restarts"]) > 0:
            break
    assert int(cluster.status(job)["restarts"]) >= 1
    assert losses_of(cluster.fetch(job)) == undisturbed


def test_bf16_and_a_static_fp16_scale_follow_fp32(cluster, plain):
    spec, losses = plain
    for precision in ({"compute": "bf16"}, {"compute": "fp16", "loss_scale": 1024}):
        job, ours = run(cluster, merge(spec, {"parallel": {"pipeline_parallel_size": 2}, "precision": precision}))
        assert worst_difference(ours, losses)[0] <= 0.02
        assert "slow on a CPU" in cluster.ppctl("logs", job).stdout


def test_an_overflow_is_skipped_and_told(cluster, plain):
    job, ours = run(cluster, merge(plain[0], {"parallel": {"pipeline_parallel_size": 2}, "training": {"max_steps": 30},
                                              "precision": {"compute": "fp16", "loss_scale": "dynamic", "initial_scale_power": 32, "hysteresis": 1}}))
    status = cluster.status(job)
    skipped = int(status["skipped_steps"])
    assert skipped >= 4 and float(status["loss_scale"]) == 2.0 ** (32 - skipped)
    assert ours[-1] < ours[0]
    events = cluster.ppctl("events", job).stdout
    assert events.count("STEP_SKIPPED") == skipped
    assert "the loss scale goes from" in events and "is not finite" in events
    assert f'ppft_job_skipped_steps_total{{job="{job}"}} {skipped}' in cluster.metrics()


def deepspeed_scales(overflows, scale, window, hysteresis, consecutive):
    """The loss scale after each step by DeepSpeed's DynamicLossScaler.update_scale, restated."""
    iteration, last_overflow, left, scales = 0, -1, hysteresis, []
    for overflow in overflows:
        if overflow:
            if hysteresis == 1 or left == 1:
                scale = max(scale / 2, 1.0)
            else:
                left -= 1
            last_overflow = iteration
        else:
            if consecutive:
                left = hysteresis
            if (iteration - last_overflow) % window == 0:
                if not consecutive:
                    left = hysteresis
                scale *= 2
        iteration += 1
        scales.append(scale)
    return scales


OVERFLOWS = (3, 5, 16, 17, 23, 25, 26)  # one after another, with a good step between, and around the end of a window


@pytest.mark.parametrize("dp, pp, consecutive, power", [(2, 1, False, 19), (1, 2, True, 18)])
def test_the_loss_scale_follows_deepspeed_over_overflows_at_chosen_steps(cluster, tiny, dp, pp, consecutive, power):
    """The gradient of a logit is the scale over the step's targets: with one target a row it leaves fp16's range, with some 150 it does not."""
    rows = []
    for step in range(1, 33):
        for row in demo_rows(2):
            words = row["document"].split()
            rows.append({"prompt": words[0], "completion": " a" if step in OVERFLOWS else " " + " ".join(words[1:71])})
    spec = make_spec(tiny, write_rows(cluster.dir / "chosen.jsonl", rows), data={"sequence_len": 256, "train_on_eos": "none"},
                     parallel={"data_parallel_size": dp, "pipeline_parallel_size": pp, "zero_stage": 2 if dp > 1 else 0},
                     training={"max_steps": 32, "micro_batch_size": 1, "gradient_accumulation_steps": 2 // dp, "learning_rate": 0.001},
                     precision={"compute": "fp16", "loss_scale": "dynamic", "initial_scale_power": power, "loss_scale_window": 5, "hysteresis": 2, "consecutive_hysteresis": consecutive})
    expected = deepspeed_scales([step in OVERFLOWS for step in range(1, 33)], 2.0**power, 5, 2, consecutive)
    assert 2.0**18 <= min(expected) and max(expected) <= 2.0**20, "below, the chosen steps would not overflow; above, the others would"
    job, losses = run(cluster, spec)
    trained = [row for row in cluster.json("metrics", job)["rows"] if row.get("loss") is not None]
    assert [int(row["step"]) for row in trained if row.get("skipped")] == list(OVERFLOWS)
    assert [float(row["loss_scale"]) for row in trained] == expected
    assert all(map(math.isfinite, losses))
    status = cluster.status(job)
    assert int(status["skipped_steps"]) == len(OVERFLOWS) and float(status["loss_scale"]) == expected[-1]
