"""What both sides train on: documents of chosen lengths, as text for the service and as ids for the peers, and the arithmetic that a step needs."""
import json
import os
import random
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "gpu"))
from random_model import SHAPES, linears_of  # noqa: F401

BOS, EOS = 1, 2
RANK, ALPHA, LEARNING_RATE = 16, 32, 5e-4
NUM_WORDS = 256


class Documents:
    """Documents of exactly `lengths` tokens: BOS, words that are one token each, EOS. Every token but BOS is a target on both sides."""

    def __init__(self, tokenizer_folder, lengths, seed=11):
        with open(os.path.join(tokenizer_folder, "tokenizer.json"), encoding="utf-8") as f:
            vocabulary = json.load(f)["model"]["vocab"]
        words = [token[1:] for token in sorted(vocabulary, key=vocabulary.get) if re.fullmatch("\u2581[a-z]{3,}", token)][:NUM_WORDS]
        generator = random.Random(seed)
        self.texts, self.ids = [], []
        for length in lengths:
            chosen = generator.choices(words, k=length - 2)
            self.texts.append(" ".join(chosen))
            self.ids.append([BOS, *(vocabulary["\u2581" + word] for word in chosen), EOS])
        self.check(tokenizer_folder)

    def check(self, tokenizer_folder):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return
        encoded = Tokenizer.from_file(os.path.join(tokenizer_folder, "tokenizer.json")).encode(self.texts[0]).ids
        if encoded != self.ids[0][:-1]:
            raise ValueError(f"the tokenizer of {tokenizer_folder} cuts the benches' words: they are not the same tokens for both sides")

    def write_rows(self, path):
        with open(path, "w") as f:
            for text in self.texts:
                f.write(json.dumps({"text": text}) + "\n")


def ragged_lengths(count, low, high, seed=5):
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(count)]


def adapter_weights(shape):
    return shape["num_hidden_layers"] * RANK * sum(outputs + inputs for _, outputs, inputs in linears_of(shape))


def step_flops(shape, lengths):
    """Model FLOPs of training on documents of `lengths`: a token costs 4 (N_linear + h V) + 3 A + 6 P_lora, frozen weights have no gradient; A: attention forward."""
    linear = shape["num_hidden_layers"] * sum(outputs * inputs for _, outputs, inputs in linears_of(shape))
    head = shape["hidden_size"] * shape["vocab_size"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    attention = sum(2 * n * n * query * shape["num_hidden_layers"] for n in lengths)  # two products over half a square of n x n
    return sum(lengths) * (4 * (linear + head) + 6 * adapter_weights(shape)) + 3 * attention


def job_spec(name, model, rows, *, micro_batch, sequence, accumulate, steps, device, packing=False, stages=1, checkpointing="none", virtual_stages=1,
             merge="auto"):
    return {
        "name": name,
        "model": {"base_model": model},
        "adapter": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {"datasets": [{"path": rows, "type": "completion", "field_map": {"text": "text"}}], "sequence_len": sequence, "sample_packing": packing,
                 "shuffle": False},
        "training": {"max_steps": steps, "micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulate, "learning_rate": LEARNING_RATE,
                     "lr_scheduler": "constant", "logging_steps": 1},
        "precision": {"compute": "fp32" if device == "cpu" else "bf16"},
        "parallel": {"pipeline_parallel_size": stages, "data_parallel_size": 1, "activation_checkpointing": checkpointing, "merge_micro_batches": merge,
                     **({"schedule": "interleaved_1f1b", "virtual_stages": virtual_stages} if virtual_stages > 1 else {})},
        "checkpoint": {"save_steps": 0},
        "output": {"verify": False},
    }
