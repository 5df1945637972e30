"""The benches of GPUs run as a whole on CPU cores with small shapes. What they measure there means nothing; that the lines are whole and both sides train does."""
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent


def run(tmp_path, bench, *flags):
    out = tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, HERE / bench, "--device", "cpu", "--shape", "tiny", "--json", out, *flags], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout


def check_trained(lines, case, sides):
    found = {line["side"]: line for line in lines if line.get("case") == case}
    assert set(found) >= sides, found.keys()
    for side in sides:
        line = found[side]
        assert line["last_loss"] < line["first_loss"], line
        assert line["tokens_per_second"] > 0 and line["step_ms"] > 0 and line["steps"] > 1, line
    first = [found[side]["first_loss"] for side in sides]
    assert max(first) - min(first) < 2e-3 * max(first), f"{case}: the sides do not begin with the same model and tokens: {found}"
    return found


def test_one_device_against_peft(tmp_path):
    lines, text = run(tmp_path, "gpu_vs_peft", "--cases", "1b-8x2048,1b-ragged,1b-ckpt,start-1b", "--which", "peft,liger")
    assert lines[0]["versions"]["peft"] and lines[0]["machine"]["cores"]
    found = check_trained(lines, "1b-8x2048", {"ppft", "peft"})
    assert "skipped" in found["liger"]
    ragged = {line["side"]: line for line in lines if line.get("case") == "1b-ragged"}
    assert all(ragged[side]["last_loss"] < ragged[side]["first_loss"] for side in ("ppft", "peft"))
    assert ragged["ppft"]["micro_batch_fill"] > 0.8
    assert ragged["ppft"]["supervised_tokens_per_second"] < ragged["ppft"]["tokens_per_second"]
    check_trained(lines, "1b-ckpt", {"ppft"})
    start = {line["side"]: line for line in lines if line.get("case") == "start-1b"}
    assert start["ppft"]["start_to_first_step_s"] > 0 and start["peft"]["start_to_first_step_s"] > 0
    compared = {(line["compared"], line["with"], line["metric"]) for line in lines if "compared" in line}
    assert compared == {("1b-8x2048", "peft", "tokens_per_second"), ("1b-ragged", "peft", "supervised_tokens_per_second"),
                        ("1b-ragged", "ppft 1b-8x2048", "tokens_per_second"), ("start-1b", "peft", "start_to_first_step_s")}
    assert "skipped: needs a GPU" in text.split("supervised/s")[1]


def test_two_stages_against_torch_pipelining(tmp_path):
    lines, _ = run(tmp_path, "pipeline_vs_torch", "--which", "eager")
    check_trained(lines, "1b-16x2x2048", {"ppft", "ppft, 1 device", "eager"})


def test_a_peer_past_its_limit_is_a_line(tmp_path):
    lines, _ = run(tmp_path, "gpu_vs_peft", "--limit", "1", "--peers-only", "--which", "peft", "--cases", "1b-8x2048")
    assert "after the limit" in next(line["killed"] for line in lines if "case" in line)
