"""One peer on one device: reads its orders as JSON from standard input, trains, writes JSON lines to the descriptor that the orders name.

Orders: {"which", "model" (folder), "device", "report_fd", "started" (time.time() of its start), "warm_up", "steps", "cases": [{"name", "ids" (file of int32),
"lengths", "rows_per_micro_batch", "micro_batches"}]}. Which: peft | peft-gc | compile | liger | unsloth | unsloth-gc. Started by peers.py.
"""
import json
import os
import statistics
import sys
import time
import traceback

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_unsloth(orders, lora, checkpointing):
    from unsloth import FastLanguageModel
    import torch
    model, _ = FastLanguageModel.from_pretrained(orders["model"], max_seq_length=orders["sequence"], load_in_4bit=False, dtype=torch.bfloat16)
    return FastLanguageModel.get_peft_model(model, bias="none", use_gradient_checkpointing="unsloth" if checkpointing else False, **lora)


def load_transformers(orders, lora, checkpointing):
    import torch
    if orders["which"] == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama()
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    on_cpu = orders["device"] == "cpu"
    placed = {} if on_cpu else {"device_map": {"": orders["device"]}}
    model = LlamaForCausalLM.from_pretrained(orders["model"], dtype=torch.float32 if on_cpu else torch.bfloat16, attn_implementation="sdpa", **placed)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return torch.compile(model) if orders["which"] == "compile" else model


def batches_of(case, device):
    """The case's documents as micro-batches {input_ids, labels[, attention_mask]}, padded on the right to the longest, with their supervised tokens."""
    import torch
    with open(case["ids"], "rb") as f:
        ids = torch.frombuffer(bytearray(f.read()), dtype=torch.int32).long()
    documents = list(ids.split(case["lengths"]))
    size, out = case["rows_per_micro_batch"], []
    for begin in range(0, len(documents) - size + 1, size):
        rows = documents[begin:begin + size]
        longest = max(len(row) for row in rows)
        batch = {"input_ids": torch.zeros(size, longest, dtype=torch.long), "labels": torch.full((size, longest), -100)}
        for i, row in enumerate(rows):
            batch["input_ids"][i, :len(row)] = batch["labels"][i, :len(row)] = row
        if any(len(row) < longest for row in rows):
            batch["attention_mask"] = (batch["labels"] != -100).long()
        tokens = sum(len(row) for row in rows)
        out.append(({name: tensor.to(device) for name, tensor in batch.items()}, tokens, tokens - size))
    return out


def run_case(orders, case, model, parameters, report, first):
    import torch
    device, on_gpu = orders["device"], orders["device"] != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    optimizer = torch.optim.AdamW(parameters, lr=orders["learning_rate"], weight_decay=0.0, fused=on_gpu)
    batches, count = batches_of(case, device), case["micro_batches"]

    def step(number):
        """(loss, tokens, supervised tokens)"""
        chosen = [batches[(number * count + i) % len(batches)] for i in range(count)]
        total = torch.zeros((), device=device)
        for inputs, _, _ in chosen:
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = model(**inputs).loss / count
            loss.backward()
            total += loss.detach().float()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, sum(tokens for _, tokens, _ in chosen), sum(targets for _, _, targets in chosen)

    losses = [step(0)[0]]
    wait()
    reached = time.time()
    out = {"case": case["name"]}
    if first:
        out["start_to_first_step_s"] = round(reached - orders["started"], 2)
    report({"event": "first_step", **out})
    for number in range(1, orders["warm_up"]):
        losses.append(step(number)[0])
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin, seconds, tokens, targets = time.time(), [], [], []
    for number in range(orders["warm_up"], orders["warm_up"] + orders["steps"]):
        wait()
        at = time.perf_counter()
        loss, step_tokens, step_targets = step(number)
        wait()
        seconds.append(time.perf_counter() - at)
        losses.append(loss)
        tokens.append(step_tokens)
        targets.append(step_targets)
    if on_gpu:
        out["peak_gib"] = {"allocated": round(torch.cuda.max_memory_allocated() / 2**30, 2), "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
    if seconds:
        out.update(tokens_per_second=round(statistics.median(n / s for n, s in zip(tokens, seconds)), 1),
                   supervised_tokens_per_second=round(statistics.median(n / s for n, s in zip(targets, seconds)), 1),
                   step_ms=round(1e3 * statistics.median(seconds), 2), tokens_per_step=round(sum(tokens) / len(tokens), 1))
    out.update(steps=len(seconds), warm_up=orders["warm_up"], first_loss=round(losses[0].item(), 5), last_loss=round(losses[-1].item(), 5), timed=[begin, time.time()])
    report({"event": "result", **out})


def main():
    orders = json.load(sys.stdin)
    channel = os.fdopen(orders["report_fd"], "w")

    def report(line):
        print(json.dumps(line), file=channel, flush=True)

    which = orders["which"]
    lora = {"r": orders["rank"], "lora_alpha": orders["alpha"], "lora_dropout": 0.0, "target_modules": MODULES}
    load = load_unsloth if which.startswith("unsloth") else load_transformers
    model = load(orders, lora, which.endswith("-gc"))
    import torch
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    begun = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    report({"event": "loaded", "trained_weights": sum(parameter.numel() for parameter in parameters), "seconds": round(time.time() - orders["started"], 2)})
    for number, case in enumerate(orders["cases"]):
        try:
            run_case(orders, case, model, parameters, report, first=number == 0)
        except Exception as error:  # the next case may fit
            traceback.print_exc()
            report({"event": "result", "case": case["name"], "failed": f"{type(error).__name__}: {error}"[:300]})
        for parameter in parameters:
            parameter.grad = None
        # Each case begins with the adapter that the first began with, and compiles for its own shapes.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in begun:
                    parameter.copy_(begun[name])
        torch._dynamo.reset()
        if orders["device"] != "cpu":
            torch.cuda.empty_cache()
    report({"event": "end"})


if __name__ == "__main__":
    main()
