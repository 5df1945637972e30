"""Forward and backward of a stories15M-shaped model (random weights) with LoRA r=16 on all linears, 8 x 256 tokens, every token supervised: one stage of
ours and PEFT in fp32, each in its own process. No optimizer on either side. Prints one JSON line per case.

    .deps/oracle/bin/python tests/bench/stage_step.py [threads]
"""
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, ROWS, LENGTH, VOCABULARY = 7, 8, 256, 32000

PEFT = """
import json, sys, time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder, threads, steps, docs = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).train()
ids = torch.tensor(docs)
seconds = []
for _ in range(steps):
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds))
"""


def measured(command, environment):
    """Standard output and peak memory in MiB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    return out, usage.ru_maxrss // 1024


def report(case, seconds, mib):
    median = statistics.median(seconds[1:])  # the first warms up
    print(json.dumps(dict(case=case, tokens_per_second=round(ROWS * LENGTH / median), step_seconds=round(median, 3), peak_mib=mib)), flush=True)


def main():
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    sys.path.insert(0, str(ROOT / "tests" / "worker" / "trainer" / "model"))
    from oracle import ALL, TOOL, load_file, make_model, microbatch
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    random.seed(0)
    docs = [[random.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder + "/model", vocab_size=VOCABULARY, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                           num_key_value_heads=6, tie_word_embeddings=True, initializer_range=0.02)
        request = dict(model=str(model), microbatches=[microbatch(docs)], out=folder + "/out.safetensors", targets=ALL, r=16, scale=2.0, bench_steps=STEPS,
                       loss_weight=1 / (ROWS * (LENGTH - 1)), threads=threads)
        pathlib.Path(folder, "request.json").write_text(json.dumps(request))
        _, mib = measured([str(TOOL), folder + "/request.json"], dict(environment, MKL_CBWR="AVX2,STRICT"))
        report("ppft stage, fp32", load_file(folder + "/out.safetensors")["seconds"].tolist(), mib)
        out, mib = measured([sys.executable, "-c", PEFT, json.dumps([str(model), threads, STEPS, docs])], environment)
        report("transformers + PEFT, fp32", json.loads(out), mib)


if __name__ == "__main__":
    main()
