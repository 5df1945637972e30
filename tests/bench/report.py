"""JSON lines as results come, ratios against the targets at the end, and the table that people read."""
import json
import os
import platform
import subprocess

from peers import version_of

# Dense bf16 peak of the data sheet, FLOP/s: what "mfu" divides by.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
OURS = "ppft"
# Of a rank's time, in the order of the table; what else a timeline has comes behind them, what is left last.
KINDS = ["forward", "backward", "sends", "receives", "collectives", "optimizer"]


class Report:
    def __init__(self, bench, path):
        self.bench, self.lines = bench, []
        self.file = open(path, "a") if path else None

    def add(self, line):
        line = {"bench": self.bench, **{key: value for key, value in line.items() if value is not None}}
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if self.file:
            print(text, file=self.file, flush=True)

    def close(self):
        if self.file:
            self.file.close()


def read_lines(paths):
    """Of earlier runs, the newest result of each case and side."""
    found = {}
    for path in paths:
        with open(path) as f:
            for line in map(json.loads, f):
                if "case" in line and "side" in line:
                    found[line["case"], line["side"]] = line
    return list(found.values())


def machine(root, watch, peers):
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: version_of(name, peers) for name in ("torch", "transformers", "peft", "liger_kernel", "unsloth", "unsloth_zoo", "triton")}
    return {"machine": {**watch.machine, "cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
            "versions": {name: version for name, version in versions.items() if version}, "commit": commit or None}


def mfu(flops, seconds, watch, devices=1):
    """Model FLOPs a second over the chips' dense bf16 peak; None for a chip whose peak is not known here."""
    names = watch.machine.get("gpus")
    peak = next((flops for name, flops in PEAK_FLOPS.items() if isinstance(names, list) and names and name in names[0]), None)
    return round(flops / seconds / peak / devices, 4) if peak else None


def peak_of(line):
    """GiB of the fullest device: what torch's allocator had given to tensors at most, on both sides."""
    value = line.get("peak_gib", {}).get("allocated")
    return max(value) if isinstance(value, list) and value else value or None


def value_of(line, metric):
    return peak_of(line) if metric == "peak_gib" else line.get(metric)


class Target:
    """ours / peer of `metric` in `case`; the bound is a least ratio, or a largest one where less is better. `peers`: the best of those that ran counts. `aim_value`: what ours itself is to reach, instead of a ratio."""

    def __init__(self, case, peers, metric, first, aim, other_case=None, aim_value=None):
        self.case, self.peers, self.metric, self.first, self.aim, self.other_case, self.aim_value = case, peers, metric, first, aim, other_case or case, aim_value
        self.less = metric in ("peak_gib", "start_to_first_step_s")

    def compare(self, lines):
        """A line with the ratio and whether it was met; None if one side has no figure."""
        by_key = {(line["case"], line["side"]): line for line in lines if "side" in line}
        ours = value_of(by_key.get((self.case, OURS), {}), self.metric)
        theirs = {peer: value_of(by_key.get((self.other_case, peer), {}), self.metric) for peer in self.peers}
        theirs = {peer: value for peer, value in theirs.items() if value}
        if not ours or not theirs:
            return None
        peer = (min if self.less else max)(theirs, key=theirs.get)
        ratio = ours / theirs[peer]
        meets = lambda value, bound: bound is not None and (value <= bound if self.less else value >= bound)
        best = meets(ours, self.aim_value) if self.aim_value else meets(ratio, self.aim)
        # Without bounds it is told for information.
        met = "aim" if best else "target" if meets(ratio, self.first) else "" if (self.first, self.aim, self.aim_value) == (None,) * 3 else "missed"
        return {"compared": self.case, "with": peer if self.other_case == self.case else f"{peer} {self.other_case}", "metric": self.metric, "ours": ours,
                "theirs": theirs[peer], "ratio": round(ratio, 3), "target": self.first, "aim": self.aim, "aim_value": self.aim_value, "met": met}


def print_table(lines, comparisons):
    columns = ["case", "side", "tokens/s", "supervised/s", "step ms", "MFU", "GPU busy", "peak GiB", "device GiB", "first s", "loss"]
    rows = []
    number = lambda value, form: "" if value is None else format(value, form)
    for line in lines:
        if "side" not in line:
            continue
        trouble = next((f"{word}: {line[word]}" for word in ("skipped", "failed", "killed") if word in line), None)
        if trouble:
            rows.append([line["case"], line["side"], trouble[:110]])
            continue
        peaks = line.get("peak_gib", {})
        many = lambda value: "" if value is None else "+".join(f"{v:.1f}" for v in value) if isinstance(value, list) else f"{value:.1f}"
        busy = line.get("gpu_busy")
        rows.append([line["case"], line["side"], number(line.get("tokens_per_second"), ",.0f"), number(line.get("supervised_tokens_per_second"), ",.0f"),
                     number(line.get("step_ms"), ".1f"), number(line.get("mfu"), ".3f"), "" if not busy else "/".join(f"{b:.2f}" for b in busy),
                     many(peaks.get("allocated")), many(peaks.get("device")), number(line.get("start_to_first_step_s"), ".1f"),
                     f"{line['first_loss']:.3f} > {line['last_loss']:.3f}" if "first_loss" in line and "last_loss" in line else ""])
    full = [row for row in rows if len(row) == len(columns)]
    widths = [max(map(len, column)) for column in zip(columns, *full)] if full else list(map(len, columns))
    print()
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
              if len(row) == len(columns) else f"{row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}")
    print_busy(lines)
    if comparisons:
        print(f"\n{'compared':14} {'with':20} {'what':29} {'ours':>10} {'theirs':>10} {'ratio':>7} {'target':>7} {'aim':>6}")
    for c in comparisons:
        print(f"{c['compared']:14} {c['with']:20} {c['metric']:29} {c['ours']:>10,.1f} {c['theirs']:>10,.1f} {c['ratio']:>7.2f} {number(c['target'], '.2f'):>7} "
              f"{number(c['aim'], '.2f') or number(c['aim_value'], '.0f') + (' s' if c['aim_value'] else ''):>6}  {c['met']}")


def busy_table(lines):
    """(columns, rows) of what each stage of ours did with its time, as shares of it; no rows without timelines."""
    shares = [(line, stage, kinds) for line in lines if line.get("busy_share") for stage, kinds in line["busy_share"].items() if stage != "times"]
    more = sorted({kind for _, _, kinds in shares for kind in kinds} - {*KINDS, "rest"})
    named = [*KINDS, *more, "rest"]
    rows = [[line["case"], line["side"], stage, *(f"{kinds[kind]:.3f}" if kind in kinds else "" for kind in named), line["busy_share"].get("times") or ""] for line, stage, kinds in shares]
    return ["case", "side", "stage", *named, "times of"], rows


def print_busy(lines):
    columns, rows = busy_table(lines)
    if not rows:
        return
    print("\nShares of a stage's time, by its timeline:")
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))


def print_markdown(lines):
    """The figures as the README has them: a row a case, ours first, then each peer with ours / peer; then the shares of the stages' time."""
    cases = {}
    for line in lines:
        if "side" in line:
            cases.setdefault(line["case"], {})[line["side"]] = line
    print("\n| case | ppft | peers (ppft / peer) | peak memory (of ppft / peer) |\n|---|---|---|---|")
    for case, sides in cases.items():
        ours = sides.get(OURS, {})
        metric = next((name for name in ("tokens_per_second", "start_to_first_step_s") if name in ours), None)
        if metric is None:
            continue
        if "ragged" in case:
            metric = "supervised_tokens_per_second"
        form = (lambda value: f"{value:.1f} s") if metric.endswith("_s") else (lambda value: f"{value / 1000:.1f}k tokens/s")
        others = {side: line for side, line in sides.items() if side != OURS and line.get(metric)}
        speed = ", ".join(f"{side} {form(line[metric])} ({ours[metric] / line[metric]:.2f})" for side, line in others.items())
        peak = peak_of(ours)
        memory = ", ".join(f"{side} {peak_of(line):.1f} ({peak / peak_of(line):.2f})" for side, line in others.items() if peak and peak_of(line))
        mfu_text = f", MFU {ours['mfu']:.2f}" if ours.get("mfu") else ""
        print(f"| {case} | {form(ours[metric])}{mfu_text} | {speed} | {f'{peak:.1f} GiB; {memory}' if peak else ''} |")
    columns, rows = busy_table(lines)
    for row in [columns, ["---"] * len(columns), *rows] if rows else []:
        print(("\n" if row is columns else "") + "| " + " | ".join(row) + " |")
