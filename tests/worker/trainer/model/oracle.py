"""Random Llama models by transformers, LoRA by PEFT, and stage_model_tool run on the same input."""
import itertools
import json
import os
import pathlib
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[4]
TOOL = ROOT / "build" / "tests" / "stage_model_tool"
ASSETS = pathlib.Path(os.environ.get("PPFT_ASSETS", ROOT.parent / "shared" / "assets"))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_runs = itertools.count()


def make_model(folder, seed=0, dtype=torch.float32, shard="10GB", **changes):
    """A small random model with large enough weights that a mistake anywhere moves the logits."""
    torch.manual_seed(seed)
    config = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                  max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.15)
    config.update(changes)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def with_lora(model, folder, targets=ALL, r=4, alpha=12, rslora=False, seed=1):
    """PEFT's model with a B that is not zero, and its adapter file."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), use_rslora=rslora, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    peft.save_pretrained(folder)
    return peft, str(pathlib.Path(folder) / "adapter_model.safetensors")


def microbatch(documents, supervised=None):
    """documents: lists of ids; supervised: per document the positions whose token is a target (default: all but the first)."""
    cu, ids, rows, targets = [0], [], [], []
    for d, document in enumerate(documents):
        start = len(ids)
        ids += document
        for t in (supervised[d] if supervised else range(1, len(document))):
            rows.append(start + t - 1)
            targets.append(document[t])
        cu.append(len(ids))
    return dict(cu_seqlens=cu, ids=ids, target_rows=rows, target_ids=targets)


def run_tool(tmp, model, microbatches, **request):
    out = pathlib.Path(tmp) / f"out{next(_runs)}.safetensors"  # load_file maps it, so a later run must not overwrite it
    request.update(model=str(model), microbatches=microbatches, out=str(out))
    path = pathlib.Path(tmp) / "request.json"
    path.write_text(json.dumps(request))
    done = subprocess.run([str(TOOL), str(path)], capture_output=True, text=True, env=dict(os.environ, MKL_CBWR="COMPATIBLE"))
    assert done.returncode == 0, done.stderr
    return load_file(str(out))


def relative(ours, theirs):
    """Largest difference over the largest value."""
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
