"""Llama folders with random weights: speed and memory do not care what the numbers are.

    python3 tests/gpu/random_model.py SHAPE FOLDER TOKENIZER_FOLDER
"""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib

SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=32000,
                 tie_word_embeddings=True, max_position_embeddings=2048, rope_theta=10000.0),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
               tie_word_embeddings=True, max_position_embeddings=131072, rope_theta=500000.0),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072, rope_theta=500000.0),
}
WEIGHTS = "model.safetensors"
SMALL_BYTES = 1 << 26  # up to here Python makes the numbers itself, sooner than it imports torch


def linears_of(shape):
    """(name, outputs, inputs) of one layer's linear modules."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    q, kv = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    return [("self_attn.q_proj", q, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h), ("self_attn.o_proj", h, q), ("mlp.gate_proj", f, h),
            ("mlp.up_proj", f, h), ("mlp.down_proj", h, f)]


def tensors_of(shape):
    """(name, size) of every tensor in the file."""
    h = shape["hidden_size"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], h)
    for i in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, outputs, inputs in linears_of(shape):
            yield prefix + name + ".weight", (outputs, inputs)
        yield prefix + "input_layernorm.weight", (h,)
        yield prefix + "post_attention_layernorm.weight", (h,)
    yield "model.norm.weight", (h,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], h)


def random_bytes(name, size, count, by_torch):
    """Normal with deviation 0.02 in bf16; norms are 1. Something that a file can write."""
    if len(size) == 1:
        return struct.pack("<H", 0x3F80) * count
    seed = zlib.crc32(name.encode())
    if not by_torch:
        generator = random.Random(seed)
        table = [struct.pack("<f", generator.gauss(0, 0.02))[2:] for _ in range(4096)]
        return b"".join(generator.choices(table, k=count))
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.empty(count, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed))
    return values.cpu().view(torch.uint8).numpy()


def make_model(folder, shape, tokenizer):
    """A Hugging Face folder for `shape`, one of SHAPES' values, with the tokenizer of the folder `tokenizer`. Complete or absent: WEIGHTS comes last."""
    os.makedirs(folder, exist_ok=True)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = dict(shape, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False,
                  torch_dtype="bfloat16", **tokens)
    for name, content in (("config.json", config), ("generation_config.json", tokens)):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(content, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(os.path.join(tokenizer, name), os.path.join(folder, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    tensors = list(tensors_of(shape))
    for name, size in tensors:
        count = 1
        for n in size:
            count *= n
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + 2 * count]}
        offset += 2 * count
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path = os.path.join(folder, WEIGHTS)
    with open(path + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name, size in tensors:
            begin, end = header[name]["data_offsets"]
            f.write(random_bytes(name, size, (end - begin) // 2, by_torch=offset > SMALL_BYTES))
    os.rename(path + ".part", path)


def make_apart(folder, shape_name, tokenizer):
    """make_model in a process of its own: what it held of a GPU is free afterwards."""
    subprocess.run([sys.executable, os.path.abspath(__file__), shape_name, folder, tokenizer], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    make_model(sys.argv[2], SHAPES[sys.argv[1]], sys.argv[3])
