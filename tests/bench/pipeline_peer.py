"""One rank of torch.distributed.pipelining (1F1B) over transformers' Llama layers with PEFT's LoRA in them. Orders as JSON on standard input, results to a descriptor.

Orders: {"rank", "ranks", "rendezvous" (file), "variant", "model" (folder), "device", "report_fd", "started", "layers" (of each rank), "compile", "warm_up", "steps",
"cases": [{"name", "ids", "lengths", "rows_per_micro_batch", "micro_batches"}]}. Every document of a case has the same length. Started by peers.py; rank 0 reports.
"""
import json
import os
import statistics
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch import nn

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Part(nn.Module):
    """Layers [first, end) of a Llama, with the embedding in front of the first and norm and head behind the last."""

    def __init__(self, config, first, end):
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
        self.first_layer = first
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if first == 0 else None
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, layer) for layer in range(first, end)])
        self.rotary = LlamaRotaryEmbedding(config)
        last = end == config.num_hidden_layers
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if last else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if last else None

    def forward(self, x):  # ids [rows, tokens] on the first rank, hidden [rows, tokens, width] elsewhere
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x if self.lm_head is None else self.lm_head(self.norm(x))


def load(orders, device, dtype):
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors import safe_open
    from transformers import LlamaConfig
    config = LlamaConfig.from_pretrained(orders["model"], attn_implementation="sdpa")
    config._attn_implementation = "sdpa"
    first = sum(orders["layers"][:orders["rank"]])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        part = Part(config, first, first + orders["layers"][orders["rank"]])
    torch.set_default_dtype(default)
    with safe_open(os.path.join(orders["model"], "model.safetensors"), "pt", device=str(device)) as weights, torch.no_grad():
        for name, parameter in part.named_parameters():
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                name = f"model.layers.{int(layer) + first}.{rest}"
            elif name == "lm_head.weight":
                name = "model.embed_tokens.weight" if config.tie_word_embeddings else name
            else:
                name = "model." + name
            parameter.copy_(weights.get_tensor(name))
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    part = inject_adapter_in_model(LoraConfig(r=orders["rank_of_adapter"], lora_alpha=orders["alpha"], lora_dropout=0.0, target_modules=MODULES), part)
    for parameter in part.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return part.train()


def loss_of(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def run_case(orders, case, part, device, report):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    rank, ranks, on_gpu = orders["rank"], orders["ranks"], device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    length, rows = case["lengths"][0], case["rows_per_micro_batch"] * case["micro_batches"]
    with open(case["ids"], "rb") as f:
        ids = torch.frombuffer(bytearray(f.read()), dtype=torch.int32).long().view(-1, length)
    batches = [batch.to(device) for batch in ids.split(rows) if len(batch) == rows]
    parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=orders["learning_rate"], weight_decay=0.0, fused=on_gpu)
    schedule = Schedule1F1B(PipelineStage(part, rank, ranks, device), n_microbatches=case["micro_batches"], loss_fn=loss_of)

    def step(number):
        batch, losses = batches[number % len(batches)], []
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            if rank == 0:
                schedule.step(batch)
            elif rank == ranks - 1:
                schedule.step(target=batch, losses=losses, return_outputs=False)
            else:
                schedule.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach() for loss in losses]).mean() if losses else torch.zeros((), device=device)

    losses = [step(0)]
    wait()
    reached = time.time()
    for number in range(1, orders["warm_up"]):
        losses.append(step(number))
    wait()
    dist.barrier()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin, seconds = time.time(), []
    for number in range(orders["warm_up"], orders["warm_up"] + orders["steps"]):
        at = time.perf_counter()
        losses.append(step(number))
        wait()
        dist.barrier()
        seconds.append(time.perf_counter() - at)
    end = time.time()
    mine = torch.tensor([torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30] if on_gpu else [0.0, 0.0], device=device)
    ends = torch.stack([losses[0].float(), losses[-1].float()])
    dist.broadcast(ends, src=ranks - 1)
    peaks = [torch.zeros_like(mine) for _ in range(ranks)]
    dist.all_gather(peaks, mine)
    out = {"case": case["name"], "start_to_first_step_s": round(reached - orders["started"], 2), "steps": len(seconds), "warm_up": orders["warm_up"],
           "tokens_per_second": round(rows * length / statistics.median(seconds), 1), "step_ms": round(1e3 * statistics.median(seconds), 2),
           "tokens_per_step": rows * length, "first_loss": round(ends[0].item(), 5), "last_loss": round(ends[1].item(), 5), "timed": [begin, end]}
    if on_gpu:
        out["peak_gib"] = {"allocated": [round(peak[0].item(), 2) for peak in peaks], "reserved": [round(peak[1].item(), 2) for peak in peaks]}
    report({"event": "result", **out})
    dist.barrier()  # no rank ends before the result is told


def main():
    orders = json.load(sys.stdin)
    channel = os.fdopen(orders["report_fd"], "w")

    def report(line):
        if orders["rank"] == 0:
            print(json.dumps(line), file=channel, flush=True)

    on_gpu = orders["device"] != "cpu"
    device = torch.device("cuda", orders["rank"]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // orders["ranks"]))
    torch.manual_seed(orders["rank"])
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method="file://" + orders["rendezvous"], rank=orders["rank"], world_size=orders["ranks"],
                            **({"device_id": device} if on_gpu else {}))
    part = load(orders, device, torch.bfloat16 if on_gpu else torch.float32)
    if orders["compile"]:
        for i, layer in enumerate(part.layers):
            part.layers[i] = torch.compile(layer)
    begun = [parameter.detach().cpu().clone() for parameter in part.parameters() if parameter.requires_grad]
    for case in orders["cases"]:
        run_case(orders, case, part, device, report)
        with torch.no_grad():
            for parameter, value in zip((parameter for parameter in part.parameters() if parameter.requires_grad), begun):
                parameter.copy_(value)
    report({"event": "end"})
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # The others wait for this rank: all of them end with it.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
