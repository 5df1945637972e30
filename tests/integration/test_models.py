"""Base models that are unusual, and those that change under a job's feet."""
import shutil

from service import *


def with_model(cluster, tiny, tmp_path, name, make=None):
    """A registered copy of tiny in a folder of its own, changed by `make`."""
    folder = tmp_path / "root" / name
    shutil.copytree(tiny.folder, folder)
    if make is not None:
        make(folder)
    cluster.roots.append(folder.parent)
    cluster.up()
    cluster.ppctl("models", "register", name, folder)
    return Model(name, folder, tiny.num_layers)


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_vocabulary_of_600000_gives_small_reports_and_a_small_manifest(cluster, tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(folder):
        torch.manual_seed(5)
        LlamaForCausalLM(LlamaConfig(vocab_size=600_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0,
                                     max_position_embeddings=256, eos_token_id=1, tie_word_embeddings=True)).save_pretrained(folder)

    model = with_model(cluster, tiny, tmp_path, "wide", make)
    train = write_rows(tmp_path / "train.jsonl", short_rows(8))
    job = cluster.submit(make_spec(model, train, output={"formats": ["adapter", "merged"]}, parallel={"pipeline_parallel_size": 1},
                                   training={"max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1, "micro_batch_size": 1}))
    cluster.finish(job)
    for kind in ("adapter", "merged"):
        manifest = cluster.fetch(job, kind) / "manifest.json"
        (verification,) = json.loads(manifest.read_text())["verifications"]
        assert manifest.stat().st_size < 50_000
        assert 64 <= len(verification["logit_ids"]) == len(verification["last_logits"]) <= 256


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_model_that_changed_is_refused_at_once_and_ends_the_job_that_finds_it_later(cluster, tiny, tmp_path):
    model = with_model(cluster, tiny, tmp_path, "changing")
    weights = model.folder / "model.safetensors"
    train = write_rows(tmp_path / "train.jsonl", short_rows(16))
    (cluster.dir / "job.yaml").write_text(json.dumps(make_spec(model, train, parallel={"pipeline_parallel_size": 1})))
    original, times = weights.read_bytes(), weights.stat()
    header = 8 + int.from_bytes(original[:8], "little")
    changed = bytearray(original)
    changed[header + json.loads(original[8:header])["model.embed_tokens.weight"]["data_offsets"][0]] ^= 1  # a low bit of its first number
    weights.write_bytes(changed)
    refused = cluster.ppctl("submit", "job.yaml", expect=2)
    assert all(part in refused.stderr for part in (str(weights), "model.embed_tokens.weight", "ppctl models register")), refused.stderr
    # A change that hides its time is found when the worker gets other bytes.
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    job = cluster.ppctl("submit", "job.yaml", "-o", "name").stdout.strip()
    cluster.finish(job, "FAILED")
    status = cluster.status(job)
    assert status["reason"]["code"] == "MODEL_INVALID", status
    assert str(weights) in status["reason"]["message"] and "ppctl models register" in status["reason"]["remedy"], status
    assert int(status.get("restarts", 0)) == 0

    weights.write_bytes(original)  # as it was, though touched
    cluster.finish(cluster.ppctl("submit", "job.yaml", "-o", "name").stdout.strip())
    weights.unlink()
    refused = cluster.ppctl("submit", "job.yaml", expect=2)
    assert str(weights) in refused.stderr and "gone" in refused.stderr, refused.stderr
