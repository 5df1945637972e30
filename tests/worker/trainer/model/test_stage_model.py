"""StageModel against transformers and PEFT: logits, loss, gradients of every adapter, merging, pipeline stages in one process."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from oracle import ALL, ASSETS, ROOT, load, make_model, microbatch, relative, run_tool, with_lora

LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def documents(vocabulary, lengths, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=g).tolist() for n in lengths]


def their_logits(model, docs):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([d])).logits[0].float() for d in docs])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name, changes, dtype, shard", [
    ("untied grouped-query", {}, torch.float32, "10GB"),
    ("tied", dict(tie_word_embeddings=True), torch.float32, "10GB"),
    ("one key head", dict(num_key_value_heads=1), torch.float32, "10GB"),
    ("full heads", dict(num_key_value_heads=6), torch.float32, "10GB"),
    ("own head_dim", dict(head_dim=16), torch.float32, "10GB"),
    ("llama3 rope", dict(rope_parameters=LLAMA3_ROPE), torch.float32, "10GB"),
    ("bf16 on disk", {}, torch.bfloat16, "10GB"),
    ("fp16 on disk, tied", dict(tie_word_embeddings=True), torch.float16, "10GB"),
    ("sharded with index", {}, torch.float32, "60KB"),
])
def test_logits_equal_transformers(tmp_path, name, changes, dtype, shard):
    folder = make_model(tmp_path / "model", dtype=dtype, shard=shard, **changes)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "10GB")
    docs = documents(211, [200, 1, 7])
    ours = run_tool(tmp_path, folder, [microbatch(docs)], logits=True)["logits.0"]
    assert relative(ours, their_logits(load(folder), docs)) < 1e-5


@pytest.fixture(scope="module")
def stories():
    folder = ASSETS / "models" / "stories260K-hf"
    if not folder.exists():
        pytest.skip(f"{folder} is not there (set PPFT_ASSETS)")
    return folder


def test_stories260k_logits_equal_transformers(tmp_path, stories):
    ids = json.loads((stories.parent / "expected_greedy_200steps.ids.json").read_text())["greedy_ids"]
    ours = run_tool(tmp_path, stories, [microbatch([ids])], logits=True)["logits.0"]
    assert relative(ours, their_logits(load(stories), [ids])) < 1e-5


def test_stories15m_logits_equal_transformers(tmp_path):
    folder = ROOT / ".deps" / "models" / "stories15M"
    assert folder.exists(), f"{folder} is missing: deploy/setup makes it"
    docs = documents(32000, [40, 9])
    ours = run_tool(tmp_path, folder, [microbatch(docs)], logits=True)["logits.0"]
    assert relative(ours, their_logits(load(folder), docs)) < 1e-5


def test_stories260k_greedy_text_is_the_expected_one(tmp_path, stories):
    expected = json.loads((stories.parent / "expected_greedy_200steps.ids.json").read_text())
    prompt, want = expected["prompt_ids"], expected["greedy_ids"]
    assert len(want) >= 200
    ours = run_tool(tmp_path, stories, [microbatch([prompt])], greedy=len(want) - len(prompt))["greedy"].tolist()
    assert ours == want


def their_step(peft, batches, supervised):
    """Loss (mean over all targets) and gradients by autograd, document by document."""
    peft.train()  # dropout is 0
    total, count = 0.0, sum(len(s) for b in supervised for s in b)
    for docs, marks in zip(batches, supervised):
        for d, s in zip(docs, marks):
            if not s:
                continue
            logp = torch.log_softmax(peft(torch.tensor([d])).logits[0], -1)
            loss = -sum(logp[t - 1, d[t]] for t in s) / count
            loss.backward()
            total += loss.item()
    return total, count, {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad}


def check_step(tmp_path, folder, batches, supervised, targets=ALL, tolerance=1e-4, r=4, alpha=12, rslora=False, **request):
    peft, adapter = with_lora(load(folder), tmp_path / "adapter", targets, r=r, alpha=alpha, rslora=rslora)
    loss, count, theirs = their_step(peft, batches, supervised)
    ours = run_tool(tmp_path, folder, [microbatch(d, s) for d, s in zip(batches, supervised)], gradients=True, adapter=adapter, targets=list(targets), r=r,
                    scale=alpha / (math.sqrt(r) if rslora else r), loss_weight=1.0 / count, **request)
    assert abs(ours.pop("loss").item() / count - loss) < 1e-5 * loss
    assert {k.removeprefix("gradient.") for k in ours} == set(theirs)
    worst = max((relative(g, theirs[k.removeprefix("gradient.")]), k) for k, g in ours.items())
    assert worst[0] < tolerance, worst


def summaries(docs):
    """Only the last third of each document is a target, as in summarization."""
    return [list(range(max(1, 2 * len(d) // 3), len(d))) for d in docs]


PACKED = [9, 31, 31, 31, 2, 17]


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["k_proj"], ["o_proj", "up_proj"], ["gate_proj", "down_proj"], ["down_proj"]], ids="+".join)
def test_gradients_equal_peft_for_targets(tmp_path, base, targets):
    docs = documents(211, PACKED)
    check_step(tmp_path, base, [docs], [summaries(docs)], targets)


@pytest.mark.parametrize("name, changes", [("tied", dict(tie_word_embeddings=True)), ("llama3 rope, own head_dim", dict(rope_parameters=LLAMA3_ROPE, head_dim=16)),
                                           ("full heads", dict(num_key_value_heads=6))])
def test_gradients_equal_peft_for_models(tmp_path, name, changes):
    folder = make_model(tmp_path / "model", **changes)
    docs = documents(211, PACKED)
    check_step(tmp_path, folder, [docs], [summaries(docs)])


def test_gradients_with_rslora_and_another_rank(tmp_path, base):
    docs = documents(211, PACKED)
    check_step(tmp_path, base, [docs], [summaries(docs)], r=7, alpha=5, rslora=True)


@pytest.mark.parametrize("stages", [[[0, 1], [1, 2]], [[0, 1], [1, 1], [2, 1]]])
def test_gradients_equal_peft_over_stages_and_microbatches(tmp_path, base, stages):
    batches = [documents(211, [9, 31, 31], 1), documents(211, [40], 2), documents(211, [3, 5, 8, 13], 3)]
    check_step(tmp_path, base, batches, [summaries(d) for d in batches], stages=stages, chunk=7)


def test_packed_equals_unpacked_and_accumulated(tmp_path, base):
    docs = documents(211, PACKED)
    marks = summaries(docs)
    _, adapter = with_lora(load(base), tmp_path / "adapter")
    common = dict(gradients=True, adapter=adapter, targets=ALL, r=4, scale=3.0, loss_weight=0.01)
    packed = run_tool(tmp_path, base, [microbatch(docs, marks)], **common)
    single = run_tool(tmp_path, base, [microbatch([d], [s]) for d, s in zip(docs, marks)], **common)
    assert packed.keys() == single.keys()
    for key in packed:
        assert relative(packed[key], single[key]) < 1e-5, key


def test_stages_and_repeats_give_the_same_bits(tmp_path, base):
    docs = documents(211, PACKED)
    _, adapter = with_lora(load(base), tmp_path / "adapter")
    common = dict(gradients=True, adapter=adapter, targets=ALL, r=4, scale=3.0, loss_weight=0.01)
    one = run_tool(tmp_path, base, [microbatch(docs)], threads=1, **common)
    again = run_tool(tmp_path, base, [microbatch(docs)], threads=1, **common)
    three = run_tool(tmp_path, base, [microbatch(docs)], threads=1, stages=[[0, 1], [1, 1], [2, 1]], **common)
    for key in one:
        assert torch.equal(one[key], again[key]), key
        assert torch.equal(one[key], three[key]), key


@pytest.mark.parametrize("compute, tolerance", [("BF16", 0.1), ("F16", 0.01)])
def test_narrow_compute_is_close(tmp_path, base, compute, tolerance):
    docs = documents(211, [20, 30])
    _, adapter = with_lora(load(base), tmp_path / "adapter")
    common = dict(gradients=True, adapter=adapter, targets=ALL, r=4, scale=3.0, loss_weight=1.0)
    wide = run_tool(tmp_path, base, [microbatch(docs)], **common)
    narrow = run_tool(tmp_path, base, [microbatch(docs)], compute=compute, **common)
    for key in wide:
        assert narrow[key].dtype == wide[key].dtype
        # Per tensor by norm: single elements of a narrow type may be far off.
        assert ((narrow[key] - wide[key]).double().norm() / wide[key].double().norm()).item() < tolerance, key


def test_dropout_does_not_depend_on_the_partition_and_keeps_the_mean(tmp_path, base):
    docs = documents(211, PACKED)
    _, adapter = with_lora(load(base), tmp_path / "adapter")
    common = dict(gradients=True, adapter=adapter, targets=ALL, r=4, scale=3.0, loss_weight=0.01)
    plain = run_tool(tmp_path, base, [microbatch(docs)], **common)
    one = run_tool(tmp_path, base, [microbatch(docs)], dropout=0.3, threads=1, **common)
    two = run_tool(tmp_path, base, [microbatch(docs)], dropout=0.3, threads=1, stages=[[0, 2], [2, 1]], **common)
    other_step = run_tool(tmp_path, base, [microbatch(docs)], dropout=0.3, step=2, **common)
    evaluation = run_tool(tmp_path, base, [microbatch(docs)], dropout=0.3, training=False, **common)
    for key in plain:
        assert torch.equal(one[key], two[key]), key
        assert relative(evaluation[key], plain[key]) < 1e-6, key
    assert one["loss"] != plain["loss"] and one["loss"] != other_step["loss"]
    losses = [run_tool(tmp_path, base, [microbatch(docs)], dropout=0.05, step=s, **common)["loss"].item() for s in range(1, 9)]
    assert abs(sum(losses) / 8 / plain["loss"].item() - 1) < 0.1


def test_initial_adapter_is_pefts_distribution_and_independent_of_stages(tmp_path, base):
    docs = documents(211, [5])
    files = []
    for i, stages in enumerate([[[0, 3]], [[0, 1], [1, 2]]]):
        files.append(str(tmp_path / f"adapter{i}.safetensors"))
        run_tool(tmp_path, base, [microbatch(docs)], targets=ALL, r=8, scale=1.0, stages=stages, adapter_out=files[-1])
    one, two = load_file(files[0]), load_file(files[1])
    peft, _ = with_lora(load(base), tmp_path / "adapter", r=8)
    shapes = {k.replace(".default", ""): p.shape for k, p in peft.named_parameters() if p.requires_grad}
    assert {k: v.shape for k, v in one.items()} == shapes
    for key, value in one.items():
        assert torch.equal(value, two[key])
        if "lora_B" in key:
            assert not value.any()
        else:
            bound = 1 / math.sqrt(value.shape[1])
            assert value.abs().max() <= bound
            assert abs(value.std().item() / (bound / math.sqrt(3)) - 1) < 0.15 and abs(value.mean().item()) < 0.15 * bound
    assert len({tuple(v.flatten()[:4].tolist()) for k, v in one.items() if "lora_A" in k}) == 21  # every module draws its own numbers


@pytest.mark.parametrize("tied", [False, True])
def test_merged_model_equals_base_and_adapter(tmp_path, tied):
    folder = make_model(tmp_path / "model", tie_word_embeddings=tied)
    docs = documents(211, [50, 20])
    peft, adapter = with_lora(load(folder), tmp_path / "adapter")
    merged = tmp_path / "merged"
    merged.mkdir()
    shards = [str(merged / f"model-{i}.safetensors") for i in (1, 2)]
    ours = run_tool(tmp_path, folder, [microbatch(docs)], logits=True, adapter=adapter, targets=ALL, r=4, scale=3.0, stages=[[0, 2], [2, 1]], merged=shards)["logits.0"]
    assert relative(ours, their_logits(peft, docs)) < 1e-5
    names = [list(load_file(s)) for s in shards]
    assert not set(names[0]) & set(names[1])
    original = load_file(str(folder / "model.safetensors"))
    assert set(names[0] + names[1]) == set(original)
    index = dict(metadata={}, weight_map={n: f"model-{i + 1}.safetensors" for i in (0, 1) for n in names[i]})
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / "config.json", merged)
    assert relative(their_logits(load(merged), docs), ours) < 1e-5
    read_back = run_tool(tmp_path, merged, [microbatch(docs)], logits=True)["logits.0"]
    assert relative(read_back, ours) < 1e-5


def test_merge_of_a_narrow_computation_uses_the_original_weights(tmp_path, base):
    _, adapter = with_lora(load(base), tmp_path / "adapter")
    files = {}
    for compute in ("F32", "BF16"):
        files[compute] = str(tmp_path / f"{compute}.safetensors")
        run_tool(tmp_path, base, [microbatch([[1, 2]])], adapter=adapter, targets=ALL, r=4, scale=3.0, compute=compute, merged=[files[compute]])
    wide, narrow = load_file(files["F32"]), load_file(files["BF16"])
    for key in wide:
        assert torch.equal(wide[key], narrow[key]), key


def test_an_adapter_of_another_rank_is_refused(tmp_path, base):
    _, adapter = with_lora(load(base), tmp_path / "adapter", r=4)
    with pytest.raises(AssertionError, match=r"q_proj.lora_A.weight has the shape \[4, 48\], but this job needs \[8, 48\]"):
        run_tool(tmp_path, base, [microbatch([[1, 2]])], adapter=adapter, targets=ALL, r=8)
