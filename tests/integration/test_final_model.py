"""What `ppctl fetch` brings: read by PEFT and transformers as it is, offline."""
import os
import subprocess
import sys

import pytest
import torch

from service import *


@pytest.fixture(scope="module", params=["tiny", "stories260k"])
def trained(request, tmp_path_factory):
    """(model, adapter folder, merged folder, manifest) of a short run with evaluation."""
    model = request.getfixturevalue(request.param)
    tmp_path = tmp_path_factory.mktemp("final")
    train = write_rows(tmp_path / "train.jsonl", short_rows(64))
    held_out = write_rows(tmp_path / "heldout.jsonl", short_rows(72)[64:])
    with serving(tmp_path, model) as cluster:
        job = cluster.submit(make_spec(model, train, start_adapter(model, tmp_path / "adapter"), output={"formats": ["adapter", "merged"], "merge_dtype": "float32"},
                                       evaluation={"eval_steps": 5, "eval_on_start": True}, data={"test_datasets": [{"path": held_out, "type": "prompt_completion"}]}))
        cluster.finish(job)
        yield model, cluster.fetch(job), cluster.fetch(job, "merged"), cluster.json("checkpoints", job)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def verification(folder):
    (found,) = [entry for entry in manifest_of(folder)["verifications"] if entry["type"] == manifest_of(folder)["type"]]
    return found


def reported_logits_agree(model, folder):
    reported = verification(folder)
    assert 0 <= float(reported["max_relative_difference"]) <= 1e-4
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[int(token) for token in reported["probe_ids"]]])).logits[0, -1]
    ids = [int(token) for token in reported["logit_ids"]]
    assert ids == sorted(set(ids)) and len(ids) <= 256
    assert set(logits.topk(8).indices.tolist()) <= set(ids), "the likeliest tokens are among them"
    ours = torch.tensor([float(value) for value in reported["last_logits"]])
    assert (logits[ids] - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert (folder / "manifest.json").stat().st_size < 50_000
    assert (folder / "manifest.json").stat().st_mode & 0o777 == (folder / "README.md").stat().st_mode & 0o777


def test_peft_loads_the_adapter_and_its_logits_are_the_trainers(trained):
    model, adapter, _, _ = trained
    reported_logits_agree(model.with_adapter(adapter).eval(), adapter)


def test_transformers_loads_the_merged_model_and_its_logits_are_the_trainers(trained):
    from transformers import AutoModelForCausalLM
    _, _, merged, _ = trained
    reported_logits_agree(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), merged)


def test_both_load_offline_in_a_fresh_process(trained):
    model, adapter, merged, _ = trained
    code = ("import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\nfrom peft import PeftModel\n"
            "base, adapter, merged = sys.argv[1:]\nids = AutoTokenizer.from_pretrained(merged)('Once upon a time', return_tensors='pt').input_ids\n"
            "a = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()(input_ids=ids).logits\n"
            "b = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=ids).logits\n"
            "assert AutoTokenizer.from_pretrained(adapter)('Once upon a time').input_ids == ids[0].tolist()\n"
            "assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (a - b).abs().max()\n")
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    done = subprocess.run([sys.executable, "-c", code, model.folder, adapter, merged], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_history_is_as_transformers_writes_it(trained):
    _, adapter, _, _ = trained
    state = json.loads((adapter / "trainer_state.json").read_text())
    assert state["global_step"] == 20
    training = [row for row in state["log_history"] if "loss" in row]
    evaluation = [row for row in state["log_history"] if "eval_loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert [row["step"] for row in evaluation] == [0, 5, 10, 15, 20]
    assert all({"step", "epoch", "loss", "learning_rate", "grad_norm"} <= set(row) for row in training)
    assert training[7]["epoch"] == pytest.approx(1.0)  # 64 rows, 8 a step
    assert state["best_metric"] == min(row["eval_loss"] for row in evaluation if row["step"] > 0) or state["best_metric"] == min(row["eval_loss"] for row in evaluation)


def test_the_folder_is_complete(trained):
    _, adapter, merged, _ = trained
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "trainer_state.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in adapter.iterdir()}
    assert {"config.json", "tokenizer.json", "trainer_state.json"} <= {path.name for path in merged.iterdir()}
    assert list(merged.glob("*.safetensors"))
    for folder in (adapter, merged):
        for file in manifest_of(folder)["files"]:
            assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]


def test_checkpoints_are_listed_and_at_most_two_are_kept_beside_the_best(trained):
    *_, checkpoints = trained
    steps = [int(entry["state"]["step"]) for entry in checkpoints["checkpoints"]]
    assert 20 in steps and 1 <= len(steps) <= 3
