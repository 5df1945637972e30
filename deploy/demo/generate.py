"""Writes the summary of one document, greedily, with the base model and with the adapter on top: a plain numpy forward pass, meant to be read."""
import argparse
import json
import pathlib
import struct
import sys

import numpy
from tokenizers import Tokenizer


def read_safetensors(path):
    """name -> float32 array; F32, F16 and BF16 files."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin:8 + size + end]
        if entry["dtype"] == "BF16":
            values = (numpy.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = numpy.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def add_adapter(weights, folder):
    """W + scale B A for every module that the adapter has."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    adapter = read_safetensors(folder / "adapter_model.safetensors")
    merged = dict(weights)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged[f"{module}.weight"] = weights[f"{module}.weight"] + scale * adapter[f"{name.removesuffix('lora_A.weight')}lora_B.weight"] @ a
    return merged


class Llama:
    """One sequence, float32, with a cache of keys and values."""

    def __init__(self, config, weights):
        self.w, self.layers, self.eps = weights, config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.angles = config["rope_theta"]**(-numpy.arange(0, self.head_dim, 2) / self.head_dim)
        self.cache = [None] * self.layers
        self.length = 0

    def norm(self, x, name):
        return x / numpy.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rotate(self, x):  # [heads, tokens, head_dim]
        at = numpy.arange(self.length, self.length + x.shape[1])[:, None] * self.angles
        cos, sin = numpy.cos(at), numpy.sin(at)
        left, right = numpy.split(x, 2, -1)
        return numpy.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    def attention(self, x, layer):  # [tokens, hidden]
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (x @ self.w[f"{prefix}{name}_proj.weight"].T for name in "qkv")
        q, k, v = (part.reshape(len(x), -1, self.head_dim).transpose(1, 0, 2) for part in (q, k, v))
        q, k = self.rotate(q), self.rotate(k)
        if self.cache[layer] is not None:
            k, v = (numpy.concatenate([old, new], 1) for old, new in zip(self.cache[layer], (k, v)))
        self.cache[layer] = (k, v)
        k, v = (part.repeat(self.heads // self.kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(0, 2, 1) / self.head_dim**0.5
        scores += numpy.triu(numpy.full(scores.shape[1:], -numpy.inf), 1 + self.length)
        scores = numpy.exp(scores - scores.max(-1, keepdims=True))
        out = (scores / scores.sum(-1, keepdims=True)) @ v
        return out.transpose(1, 0, 2).reshape(len(x), -1) @ self.w[f"{prefix}o_proj.weight"].T

    def mlp(self, x, layer):
        prefix = f"model.layers.{layer}.mlp."
        gate = x @ self.w[f"{prefix}gate_proj.weight"].T
        return (gate / (1 + numpy.exp(-gate)) * (x @ self.w[f"{prefix}up_proj.weight"].T)) @ self.w[f"{prefix}down_proj.weight"].T

    def next_token(self, ids):
        """Feeds ids and returns the likeliest next one."""
        x = self.w["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            x = x + self.attention(self.norm(x, f"model.layers.{layer}.input_layernorm.weight"), layer)
            x = x + self.mlp(self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight"), layer)
        self.length += len(ids)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return int((head @ self.norm(x[-1], "model.norm.weight")).argmax())


def write_summary(config, weights, tokenizer, prompt, limit):
    """One sentence, or `limit` tokens."""
    ids = tokenizer.encode(prompt).ids
    model, out, text = Llama(config, weights), [], ""
    new = model.next_token(ids)
    while new != config["eos_token_id"] and len(out) < limit and model.length < config["max_position_embeddings"] and not text.endswith((".", "!", "?")):
        out.append(new)
        # Decoded with the prompt before it, since the decoder drops the first blank.
        text = " ".join(tokenizer.decode(ids + out)[len(tokenizer.decode(ids)):].split())
        new = model.next_token([new])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the base model's folder")
    parser.add_argument("--adapter", type=pathlib.Path, required=True, help="a PEFT adapter's folder, such as final_model")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="JSONL with document and summary")
    parser.add_argument("--row", type=int, default=1, help="row of the data, from 1")
    parser.add_argument("--instruction_prefix", default="Summarize the following story:\n\n")
    parser.add_argument("--response_prefix", default="\n\nSummary:\n")
    parser.add_argument("--max_tokens", type=int, default=48)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    if config.get("rope_scaling"):
        sys.exit(f"{arguments.model}: this small program knows no RoPE scaling; load the model with transformers instead")
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    row = json.loads(arguments.data.read_text(encoding="utf-8").splitlines()[arguments.row - 1])
    prompt = arguments.instruction_prefix + row["document"] + arguments.response_prefix
    base = read_safetensors(arguments.model / "model.safetensors")
    print(f"document:        {row['document']}\n")
    print(f"written by hand: {row['summary']}")
    print(f"before:          {write_summary(config, base, tokenizer, prompt, arguments.max_tokens)}")
    print(f"after:           {write_summary(config, add_adapter(base, arguments.adapter), tokenizer, prompt, arguments.max_tokens)}")


if __name__ == "__main__":
    main()
