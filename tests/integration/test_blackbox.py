"""From the outside, with what the other tests do not use: other heads, types on disk, data and job files, against transformers and PEFT."""
import copy
import json
import math
import os
import signal

import pytest
import torch

from service import adapter_digest, encode, history, make_spec, merge, short_rows, wait_for, worst_difference, write_rows, Model


def variant(tiny, folder, dtype=torch.float32, shard_size="5GB", **changes):
    """A Llama with random weights and the tokenizer of `tiny`."""
    import shutil
    from transformers import LlamaConfig, LlamaForCausalLM
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15, "tie_word_embeddings": False}
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return Model(folder.name, folder, {**sizes, **changes}["num_hidden_layers"])


def edit_config(model, **changes):
    path = model.folder / "config.json"
    config = {key: value for key, value in {**json.loads(path.read_text()), **changes}.items() if value is not None}
    path.write_text(json.dumps(config))


def old_rope_keys(tiny, folder):
    model = variant(tiny, folder, torch.bfloat16, num_key_value_heads=4)
    edit_config(model, rope_parameters=None, rope_theta=500000.0, dtype=None, torch_dtype="bfloat16",
                rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})
    return model


def one_kv_head_in_shards(tiny, folder):
    model = variant(tiny, folder, torch.float16, "40KB", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, num_hidden_layers=5)
    assert (folder / "model.safetensors.index.json").exists()
    return model


def own_head_in_spite_of_the_config(tiny, folder):
    """Old checkpoints: config.json ties the head, the file holds another one. transformers uses what is there."""
    model = variant(tiny, folder)
    edit_config(model, tie_word_embeddings=True)
    return model


CASES = {  # model, changes of the job
    "old rope keys, bf16": (old_rope_keys, {"adapter": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
                                            "training": {"lr_scheduler": "wsd", "decay_ratio": 0.25, "min_lr_ratio": 0.1, "max_grad_norm": 0}}),
    "one kv head, wide heads, fp16 shards": (one_kv_head_in_shards, {"adapter": {"r": 4, "lora_alpha": 8, "use_rslora": True},
                                                                     "training": {"lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.2, "max_grad_norm": 0.05},
                                                                     "parallel": {"pipeline_parallel_size": 3, "layers_per_stage": [1, 3, 1], "schedule": "gpipe"}}),
    "own head": (own_head_in_spite_of_the_config, {"adapter": {"target_modules": ["gate_proj", "down_proj"]}, "training": {"lr_scheduler": "linear"}}),
}


def rates(training):
    """Learning rate of each step by transformers."""
    from transformers import get_scheduler
    from transformers.optimization import get_wsd_schedule
    steps, warmup, name, floor = training["max_steps"], training["warmup_steps"], training["lr_scheduler"], training.get("min_lr_ratio", 0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training["learning_rate"])
    if name == "wsd":
        schedule = get_wsd_schedule(optimizer, num_warmup_steps=warmup, num_decay_steps=math.ceil(training["decay_ratio"] * steps), num_training_steps=steps, min_lr_ratio=floor)
    else:
        schedule = get_scheduler(name, optimizer, warmup, steps, **({"scheduler_specific_kwargs": {"min_lr_rate": floor}} if name == "cosine_with_min_lr" else {}))
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def oracle(model, rows, spec):
    """Loss, gradient norm and rate of each step; the last step of an epoch takes what is left of the rows."""
    training = spec["training"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=training["weight_decay"])
    size = training["micro_batch_size"] * training["gradient_accumulation_steps"]
    batches = [rows[at:at + size] for at in range(0, len(rows), size)]
    out = []
    for step, rate in enumerate(rates(training)):
        batch = batches[step % len(batches)]
        targets = sum(label != -100 for _, labels in batch for label in labels[1:])
        optimizer.zero_grad()
        total = 0.0
        for ids, labels in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / targets
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, training["max_grad_norm"] or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        out.append((total, norm.item(), rate))
    return out


@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_other_models_and_schedules_against_peft(cluster, tiny, tmp_path):
    """Uneven last steps, Windows line ends, a byte order mark, a list of rows, emoji at the boundary, a base model named by its path."""
    from peft import LoraConfig, get_peft_model
    rows = short_rows(19)
    for index, row in enumerate(rows):
        row["prompt"] += (" 😀", " naïve", " e\u0301\n", "")[index % 4]
        row["completion"] = ("👩‍👩‍👧", "日本語", " ", "\t")[index % 4] + row["completion"]
    lines = [json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows)]
    windows, listed = cluster.dir / "windows rows.jsonl", cluster.dir / "list.json"
    windows.write_bytes(b"\xef\xbb\xbf" + "".join(line + "\r\n" for line in lines).encode())
    listed.write_text("[" + ",\n".join(lines) + "]\n")
    jobs = {}
    for index, (what, (make, changes)) in enumerate(CASES.items()):
        model = make(tiny, tmp_path / f"model-{index}")
        cluster.roots.append(model.folder)
        spec = make_spec(model, (windows, listed)[index % 2], training={"max_steps": 5, "gradient_accumulation_steps": 4, "warmup_steps": 2}, data={"sequence_len": 200}, checkpoint={"save_steps": 0})
        jobs[what] = (model, merge(spec, changes))
    cluster.up()  # with the new roots
    for index, (what, (model, spec)) in enumerate(jobs.items()):
        adapter = spec["adapter"]
        torch.manual_seed(7)
        peft_model = get_peft_model(model.base(), LoraConfig(r=adapter["r"], lora_alpha=adapter["lora_alpha"], target_modules=adapter["target_modules"],
                                                             use_rslora=adapter.get("use_rslora", False), task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
        peft_model.save_pretrained(cluster.dir / f"start-{index}")
        spec["model"] = {"base_model": str(model.folder), "init_adapter": f"start-{index}"}
        jobs[what] += (peft_model, cluster.submit(spec, f"job-{index}.yaml"))
    for what, (model, spec, peft_model, job) in jobs.items():
        tokenizer = model.tokenizer()
        theirs = oracle(peft_model, [encode(tokenizer, row) for row in rows], spec)
        cluster.finish(job)
        ours = [row for row in history(cluster.fetch(job)) if "loss" in row]
        assert worst_difference([row["loss"] for row in ours], [loss for loss, _, _ in theirs])[0] < 1e-5, what
        assert worst_difference([row["grad_norm"] for row in ours], [norm for _, norm, _ in theirs])[0] < 1e-4, what
        assert [row["learning_rate"] for row in ours] == pytest.approx([rate for _, _, rate in theirs], rel=1e-9, abs=1e-15), what


def test_a_job_as_get_prints_it_gives_the_same_adapter(cluster, tiny):
    cluster.ppctl("models", "upload", "tiny", tiny.folder)
    train = write_rows(cluster.dir / "train.jsonl", short_rows(40))
    changes = {"adapter": {"lora_dropout": 0.2}, "data": {"val_set_size": 0.2, "shuffle": True, "sample_packing": True}, "labels": {"team": "nlp", "tier": "1"},
               "training": {"max_steps": 40, "learning_rate": 0.05, "max_grad_norm": 0}, "evaluation": {"eval_steps": 3, "early_stopping_patience": 2},
               "checkpoint": {"save_steps": 3, "save_total_limit": 2, "load_best_model_at_end": True}}
    first = cluster.submit(make_spec(tiny, train, **changes))
    os.remove(train)  # it was uploaded
    cluster.finish(first)
    (cluster.dir / "again.yaml").write_text(cluster.ppctl("get", first, "-o", "yaml").stdout)
    second = cluster.ppctl("submit", "again.yaml", "-o", "name").stdout.strip()
    cluster.finish(second)
    assert cluster.json("get", first)["spec"] == cluster.json("get", second)["spec"]
    one, two = cluster.fetch(first), cluster.fetch(second)
    assert adapter_digest(one) == adapter_digest(two) and history(one) == history(two)
    assert {job["id"] for job in cluster.json("list", "--label", "team=nlp", "--label", "tier=1")["jobs"]} == {first, second}

    evaluations = [row for row in history(one) if "eval_loss" in row]
    best = min(evaluations, key=lambda row: row["eval_loss"])
    assert int(cluster.status(first)["step"]) < 40, "it stopped early"
    assert len(evaluations) - 1 - evaluations.index(best) == 2
    cluster.ppctl("fetch", first, "-o", "best", "--checkpoint", f"step:{best['step']}")
    assert adapter_digest(cluster.dir / "best") == adapter_digest(one)
    kept = cluster.json("checkpoints", first)["checkpoints"]
    assert len(kept) == 2 and {int(checkpoint["state"]["step"]) for checkpoint in kept} == {best["step"], evaluations[-1]["step"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_small_disk_refuses_what_is_too_big_and_goes_on(tmp_path, tiny):
    import subprocess
    from service import Cluster
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("mount is not allowed here")
    try:
        cluster = Cluster(disk / "cluster", 1, [])
        try:
            cluster.ppctl("models", "upload", "tiny", tiny.folder)
            big = tmp_path / "big.jsonl"
            big.write_text((json.dumps({"prompt": "a" * 1000, "completion": " b"}) + "\n") * 40000)
            refused = cluster.ppctl("data", "upload", big, expect=1)
            assert "disk is full" in refused.stderr
            spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(16)), training={"max_steps": 3, "warmup_steps": 0}, parallel={"pipeline_parallel_size": 1})
            cluster.finish(cluster.submit(spec))
        finally:
            cluster.down()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_ctrl_c_detaches_and_the_job_goes_on(cluster, tiny):
    import subprocess
    from service import BIN
    cluster.ppctl("models", "upload", "tiny", tiny.folder)
    spec = make_spec(tiny, write_rows(cluster.dir / "train.jsonl", short_rows(40)), training={"max_steps": 100000})
    (cluster.dir / "job.yaml").write_text(json.dumps(spec))
    following = subprocess.Popen([BIN / "ppctl", "submit", "job.yaml", "--follow"], env=cluster.environment, cwd=cluster.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("the job to step", lambda: (jobs := cluster.json("list").get("jobs")) and int(jobs[0]["status"]["step"]) > 3, every=0.02)
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=120)
    job = out.strip()
    assert following.returncode == 130 and f"ppctl watch {job}" in err, err
    step = cluster.step(job)
    wait_for("further steps", lambda: cluster.step(job) > step + 3, every=0.05)
    cluster.ppctl("cancel", job)
    cluster.finish(job, "CANCELLED")
