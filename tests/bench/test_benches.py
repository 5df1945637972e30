"""The benches of GPUs run as a whole on CPU cores with small shapes. What they measure there means nothing; that the lines are whole and both sides train does."""
import json
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "gpu"))
from our_side import busy_share
from random_model import make_apart
from report import OURS, Target, print_markdown, print_table
from workload import SHAPES, adapter_weights, step_flops


def run(tmp_path, bench, *flags):
    out = tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, HERE / bench, "--device", "cpu", "--shape", "tiny", "--limit", "900", "--json", out, *flags], capture_output=True, text=True, timeout=3600)
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
    lines, text = run(tmp_path, "pipeline_vs_torch", "--which", "eager")
    found = check_trained(lines, "1b-16x2x2048", {"ppft", "ppft, 1 device", "eager"})
    stages = [stage for line in found.values() for stage in line.get("busy_share", {}) if stage != "times"]
    assert text.count("  host\n") == len(stages), "each stage with a timeline is a row"


def test_a_peer_past_its_limit_is_a_line(tmp_path):
    lines, _ = run(tmp_path, "gpu_vs_peft", "--limit", "1", "--peers-only", "--which", "peft", "--cases", "1b-8x2048")
    assert "after the limit" in next(line["killed"] for line in lines if "case" in line)


# What a token costs at 2048 tokens, in GFLOP, by hand: 4 (N_linear + h V) + 3 A + 6 P_lora.
@pytest.mark.parametrize("shape, weights, gflop", [("1b", 11_272_192, 5.41), ("8b", 41_943_040, 31.9)])
def test_model_flops(shape, weights, gflop):
    assert adapter_weights(SHAPES[shape]) == weights
    assert step_flops(SHAPES[shape], [2048]) / 2048 / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert step_flops(SHAPES[shape], [1024, 1024]) < step_flops(SHAPES[shape], [2048])


def line(side, speed=None, peak=None, **more):
    return {"case": "c", "side": side, "tokens_per_second": speed, "peak_gib": peak or {}, **more}


def test_fetch_and_start(tmp_path):
    make_apart(tmp_path / "models" / "tiny", "tiny", HERE.parents[1] / ".deps" / "models" / "stories15M")
    done = subprocess.run([sys.executable, HERE / "fetch_start", tmp_path / "models" / "tiny"], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == ["nothing-cached", "cached"]
    fetched = [[int(number) for number in re.match(r"fetched (\d+) files, (\d+) bytes, (\d+) of them", line["fetch"][0]).groups()] for line in lines]
    assert fetched[0][1] == fetched[0][2] and fetched[1][:2] == fetched[0][:2] and fetched[1][2] == 0, "the second job finds it all in the cache"


@pytest.mark.parametrize("metric, lines, ratio, met", [
    ("tokens_per_second", [line(OURS, 130), line("a", 100)], 1.3, "aim"),
    ("tokens_per_second", [line(OURS, 110), line("a", 100)], 1.1, "target"),
    ("tokens_per_second", [line(OURS, 130), line("a", 100), line("b", 200)], 0.65, "missed"),  # the better of the two counts
    ("peak_gib", [line(OURS, peak={"allocated": [8.0, 12.0]}), line("a", peak={"allocated": 10.0}), line("b", peak={"allocated": 16.0})], 1.2, "missed"),
    ("peak_gib", [line(OURS, peak={"allocated": [9.0]}), line("a", peak={"allocated": 10.0})], 0.9, "aim"),
])
def test_ratios(metric, lines, ratio, met):
    less = metric == "peak_gib"
    found = Target("c", ["a", "b"], metric, 1.0, 0.9 if less else 1.25).compare(lines)
    assert found["ratio"] == pytest.approx(ratio) and found["met"] == met


def test_busy_shares_are_a_table_by_stage_and_kind(capsys):
    shares = {"times": "device", "stage 0": {"forward": 0.4, "sends": 0.01, "backward": 0.56, "rest": 0.03}, "stage 1": {"receives": 0.15, "forward": 0.5, "collectives": 0.04, "checkpoint": 0.2, "rest": 0.11}}
    print_table([line(OURS, 100, busy_share=shares), line("a", 90), line("b", skipped="not installed: b")], [])
    table = [row.split() for row in capsys.readouterr().out.split("timeline:\n")[1].splitlines()]
    assert table == [["case", "side", "stage", "forward", "backward", "sends", "receives", "collectives", "optimizer", "checkpoint", "rest", "times", "of"],
                     ["c", "ppft", "stage", "0", "0.400", "0.560", "0.010", "0.030", "device"], ["c", "ppft", "stage", "1", "0.500", "0.150", "0.040", "0.200", "0.110", "device"]]
    print_markdown([line(OURS, 100, busy_share=shares), line("a", 90)])
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert {row.count("|") for row in rows} == {13} and rows[2].startswith("| c | ppft | stage 0 | 0.400 | 0.560 | 0.010 |  |"), rows
    print_table([line(OURS, 100), line("a", 90)], [])
    assert "timeline" not in capsys.readouterr().out


def test_no_ratio_without_both_sides():
    target = Target("c", ["a"], "tokens_per_second", 1.0, 1.25)
    assert target.compare([line(OURS, 100), line("a", skipped="not installed: a")]) is None
    assert target.compare([line(OURS, failed="out of memory"), line("a", 100)]) is None


def test_shares_of_a_timeline(tmp_path):
    span = lambda rank, row, name, begin, duration: {"ph": "X", "pid": rank, "cat": row, "name": name, "ts": begin, "dur": duration, "args": {"step": 7}}
    events = [span(0, "steps", "step 7", 0, 50), span(0, "compute", "0F0", 0, 10), span(0, "compute", "0B0", 20, 15), span(0, "receives", "0RECV_B0", 10, 10),
              span(0, "optimizer", "optimizer", 45, 5), {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "rank 0"}}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events, "otherData": {"first_step": 7, "last_step": 7, "times": "device"}}))
    shares, steps = busy_share(subprocess.Popen(["true"]), path)
    assert shares == {"times": "device", "stage 0": {"forward": 0.2, "backward": 0.3, "receives": 0.2, "optimizer": 0.1, "rest": 0.2}}
    assert list(steps) == [7]
    assert busy_share(subprocess.Popen(["false"]), path) == (None, range(0))
