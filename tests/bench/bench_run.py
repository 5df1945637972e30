"""What the benches of GPUs share: their flags, a folder to work in, models and documents made once, and the time that is left."""
import os
import shutil
import subprocess
import sys
import tempfile
import time

import peers
from device_watch import DeviceWatch
from our_side import OurSide
from report import Report, machine, print_markdown, print_table, read_lines
from workload import Documents

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY_SHORTER = 32       # --shape tiny divides lengths by this
ROOM_IN_MEMORY = 64e9   # the largest model, the worker's copy of it, and some


def add_arguments(parser, cases, variants):
    words = lambda text: text.split(",")
    parser.add_argument("--bundle", help="folder of deploy/bundle; default: build/")
    parser.add_argument("--peers", help="what tests/bench/pack_peers made, or the folder unpacked from it")
    parser.add_argument("--cases", type=words, default=list(cases), metavar="A,B", help="default: all; --list shows them")
    parser.add_argument("--which", type=words, metavar="PEER,PEER", help=", ".join(variants) + "; default: those of each case")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["tiny"], help="a small model and short documents in every case")
    parser.add_argument("--json", metavar="FILE", help="lines are added to it")
    parser.add_argument("--traces", metavar="DIR", help="timelines of ours (Chrome traces) are kept there")
    parser.add_argument("--limit", type=float, default=150, metavar="S", help="a case of one side that takes longer is ended; default 150")
    parser.add_argument("--budget", type=float, metavar="S", help="nothing is begun after so many seconds, and what runs then is ended")
    parser.add_argument("--steps", type=int, help="measured steps of ours; default 24")
    parser.add_argument("--warm-up", type=int, help="steps of ours before; default 6")
    parser.add_argument("--peer-steps", type=int, help="default 20")
    parser.add_argument("--peer-warm-up", type=int, help="default 3; the first one compiles")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; default: the bundle's tokenizer/, or the demo's model")
    parser.add_argument("--work", help="models and logs stay there; default: a new folder in /dev/shm or the temporary one, removed at the end")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only the table, of these files")
    parser.add_argument("--markdown", action="store_true", help="the table as the README has it, too")


def parse(parser, cases, variants):
    args = parser.parse_args()
    small = args.shape == "tiny"
    for name, value in (("steps", 5 if small else 24), ("warm_up", 2 if small else 6), ("peer_steps", 4 if small else 20), ("peer_warm_up", 1 if small else 3)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for given, known, what in ((args.cases, cases, "case"), (args.which or [], variants, "peer")):
        for name in given:
            if name not in known:
                parser.error(f"there is no {what} {name}: {', '.join(known)}")
    if args.traces:
        args.traces = os.path.abspath(args.traces)
        os.makedirs(args.traces, exist_ok=True)
    args.bundle = os.path.abspath(args.bundle or os.path.join(ROOT, "build"))
    if args.tokenizer is None:
        packed = os.path.join(args.bundle, "tokenizer")
        args.tokenizer = packed if os.path.isdir(packed) else os.path.join(ROOT, ".deps", "models", "stories15M")
    return args


class BenchRun:
    """One run of a bench. `with` it: at the end nothing runs, and what it made is gone unless --work named a folder."""

    def __init__(self, bench, args):
        self.args, self.report = args, Report(bench, args.json)
        self.tiny = args.shape == "tiny"
        self.begin = time.monotonic()
        self.documents, self.to_remove = {}, None

    def __enter__(self):
        if self.args.work is None:
            fast = "/dev/shm" if self.args.device == "cuda" and shutil.disk_usage("/dev/shm").free > ROOM_IN_MEMORY else None
            self.args.work = self.to_remove = tempfile.mkdtemp(prefix="ppft-bench-", dir=fast)
        self.work = os.path.abspath(self.args.work)
        os.makedirs(os.path.join(self.work, "models"), exist_ok=True)
        self.peers_folder = peers.unpack(self.args.peers, self.work)
        self.watch = DeviceWatch()
        self.report.add(machine(ROOT, self.watch, self.peers_folder))
        return self

    def __exit__(self, *_):
        self.watch.close()
        self.report.close()
        if self.to_remove:
            shutil.rmtree(self.to_remove, ignore_errors=True)

    def limit(self):
        """Seconds that the next case may take; below 1 when the budget is used up."""
        left = self.args.budget - (time.monotonic() - self.begin) if self.args.budget else self.args.limit
        return min(self.args.limit, left)

    def length(self, tokens):
        return tokens // TINY_SHORTER if self.tiny else tokens

    def documents_of_lengths(self, lengths):
        key = tuple(lengths)
        if key not in self.documents:
            self.documents[key] = Documents(self.args.tokenizer, lengths)
        return self.documents[key]

    def model(self, shape):
        """Its folder; made once, on the GPU where there is one, by a process of its own so that this one holds no device memory."""
        folder = os.path.join(self.work, "models", shape)
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            begin = time.monotonic()
            subprocess.run([sys.executable, os.path.join(ROOT, "tests", "gpu", "random_model.py"), shape, folder, self.args.tokenizer], check=True)
            self.report.add({"made": shape, "seconds": round(time.monotonic() - begin, 1)})
        return folder

    def our_side(self, shape, devices):
        folder = os.path.join(self.work, f"service-{shape}")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        return OurSide(self.args.bundle, folder, os.path.join(self.work, "models"), devices, self.watch, self.args.traces)

    def peer_cases(self, program, ranks_for, cases, log_name, values=None):
        """Results of the peer's process one by one, with what the driver saw while each was measured."""
        environment = {**peers.environment(self.work, self.peers_folder), **(values or {})}
        for line in peers.run_cases(program, ranks_for, cases, self.limit, os.path.join(self.work, log_name + ".log"), environment):
            window = line.pop("timed", None)
            if window:
                line.update(self.watch.figures(*window, line.get("peak_gib", {})))
            yield line

    def write_ids(self, name, documents):
        path = os.path.join(self.work, name + ".ids")
        peers.write_ids(path, documents.ids)
        return path

    def finish(self, targets, ours):
        """Ratios and the table; the exit status: 1 if a case of ours has no figures."""
        comparisons = [found for found in (target.compare(self.report.lines) for target in targets) if found]
        for comparison in comparisons:
            self.report.add(comparison)
        print_table(self.report.lines, comparisons)
        if self.args.markdown:
            print_markdown(self.report.lines)
        print(f"\n{time.monotonic() - self.begin:.0f} s in all")
        return 1 if any(line.get("side") in ours and ("failed" in line or "killed" in line) for line in self.report.lines) else 0


def show(args, cases, targets):
    """--list and --table; True if that was all."""
    if args.list:
        for name, case in cases.items():
            print(name, case)
    elif args.table:
        lines = read_lines(args.table)
        print_table(lines, [found for found in (target.compare(lines) for target in targets) if found])
        if args.markdown:
            print_markdown(lines)
    return bool(args.list or args.table)
