"""Whole runs through the service (submit to fetch) against transformers and PEFT: every step's loss."""
import pytest
import torch

from service import *

STEPS = 200
LAYOUTS = [(1, "gpipe", 1), (1, "1f1b", 1), (1, "interleaved_1f1b", 2), (2, "gpipe", 1), (2, "1f1b", 1), (2, "interleaved_1f1b", 2), (4, "gpipe", 1), (4, "1f1b", 1)]


def layouts_of(model):
    return LAYOUTS + ([(4, "interleaved_1f1b", 2)] if model.num_layers >= 8 else [])


def run_layouts(tmp_path, model, layouts, rows, spec_changes):
    adapter = start_adapter(model, tmp_path / "adapter")
    train = write_rows(tmp_path / "train.jsonl", rows)
    spec = make_spec(model, train, adapter, **spec_changes)
    worst = {}
    with serving(tmp_path, model, max(pp for pp, _, _ in layouts)) as cluster:
        jobs = {}
        for pp, schedule, virtual in layouts:
            parallel = {"pipeline_parallel_size": pp, "schedule": schedule, "virtual_stages": virtual}
            jobs[pp, schedule] = cluster.submit(merge(spec, {"name": f"pp{pp}-{schedule.replace('_', '-')}", "parallel": parallel}))
        reference, tokenizer = model.with_adapter(adapter), model.tokenizer()  # while they run
        theirs = oracle_losses(reference, tokenizer, rows, spec)
        probe = torch.tensor([encode(tokenizer, max(rows, key=lambda row: len(row["prompt"] + row["completion"])))[0]])
        with torch.no_grad():
            expected = reference.eval()(input_ids=probe).logits
        for (pp, schedule), job in jobs.items():
            cluster.finish(job)
            folder = cluster.fetch(job)
            worst[pp, schedule] = worst_difference(losses_of(folder), theirs)
            assert {entry["stage"] for entry in cluster.status(job)["assignment"]} == set(range(pp))
            with torch.no_grad():
                trained = model.with_adapter(folder).eval()(input_ids=probe).logits
            # Over 200 steps AdamW makes whole steps of the rounding in tiny gradients: logits may part a little further than losses.
            assert (trained - expected).abs().max() <= 5e-3 * expected.abs().max()
    for layout, (difference, step) in worst.items():
        print(f"{model.name} {layout}: largest loss difference {difference:.1e} at step {step} of {len(theirs)}")
    assert max(worst.values())[0] <= 1e-4, worst


def test_stories260k_every_layout_follows_peft(tmp_path, stories260k):
    run_layouts(tmp_path, stories260k, layouts_of(stories260k), short_rows(160), {"training": {"max_steps": STEPS, "warmup_steps": 10, "gradient_accumulation_steps": 8}})


def test_stories15m_two_stages_follow_peft(tmp_path, stories15m):
    run_layouts(tmp_path, stories15m, [(2, "1f1b", 1)], short_rows(120),
                {"training": {"max_steps": STEPS, "warmup_steps": 10, "micro_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0003}})


def test_tiny_random_model_follows_peft(tmp_path, tiny):
    run_layouts(tmp_path, tiny, [(1, "1f1b", 1), (2, "1f1b", 1), (2, "interleaved_1f1b", 2)], short_rows(80), {"training": {"max_steps": 20}})


def test_packing_changes_no_loss(tmp_path, tiny):
    """Every row fits into one packed micro-batch: the step is the same set of rows, packed or not."""
    rows = short_rows(8)
    train = write_rows(tmp_path / "train.jsonl", rows)
    with serving(tmp_path, tiny, 1) as cluster:
        losses = {}
        for packed in (False, True):
            job = cluster.submit(make_spec(tiny, train, parallel={"pipeline_parallel_size": 1}, data={"sample_packing": packed, "sequence_len": 128},
                                           training={"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 10}))
            cluster.finish(job)
            losses[packed] = losses_of(cluster.fetch(job))
        assert worst_difference(losses[True], losses[False])[0] <= 1e-5
