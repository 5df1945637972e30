"""Runs every C++ and Python case of the built tree and closes with one line of counts. Called by tests/run; exit code 1 when a case failed or none ran.

Python files are shared out to several pytest processes (lanes.py), one of which begins when the C++ programs are done.
"""
import argparse
import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMES = ROOT / "build" / "log" / "times.json"  # seconds of each Python file in earlier runs
PROGRAM_SECONDS, PYTHON_SECONDS = 3600, 4 * 3600  # for hangs: a slow machine takes three times as long as a usual one
FEW_THREADS = {"OMP_NUM_THREADS": str(min(4, len(os.sched_getaffinity(0))))}  # a machine may show 64 cores and give the time of two
LANE_GIB = 3  # a lane's pytest, a cluster and its trainers
Case = collections.namedtuple("Case", "name result text")  # result: passed | failed | skipped


class Console:
    """The log and the terminal, for several threads."""

    def __init__(self, log):
        self.lock, self.log = threading.Lock(), log

    def note(self, who, line):
        with self.lock:
            self.log.write(f"{who}| {line}\n")
            self.log.flush()

    def show(self, text):
        with self.lock:
            print(text, flush=True)


class Running:
    """Processes under way: they end with this one."""

    def __init__(self):
        self.lock, self.processes, self.over = threading.Lock(), set(), False

    def start(self, command, **options):
        with self.lock:
            if self.over:
                raise SystemExit("interrupted")
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, **options)
            self.processes.add(process)
        return process

    def forget(self, process):
        if not self.over:
            with self.lock:
                self.processes.discard(process)

    def kill(self, process):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def end(self):
        """An interrupt first: pytest takes down what its cases started."""
        with self.lock:
            self.over = True
            for process in self.processes:
                try:
                    os.killpg(process.pid, signal.SIGINT)
                except ProcessLookupError:
                    pass
            deadline = time.monotonic() + 30
            for process in self.processes:
                try:
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.kill(process)


RUNNING = Running()


def run(command, console, who, seconds, cwd=ROOT, environment=None, shown=None):
    """Exit code; output goes to the log, and to the terminal what `shown` finds in a line. A command past its time is killed with its children."""
    process = RUNNING.start(command, cwd=cwd, env=environment)
    timer = threading.Timer(seconds, RUNNING.kill, [process])
    timer.start()
    try:
        for line in process.stdout:
            console.note(who, line.rstrip("\n"))
            if shown is not None and shown(line):
                console.show(line.rstrip("\n"))
        return process.wait()
    finally:
        timer.cancel()
        RUNNING.forget(process)


def programs():
    """(name, command, folder) of each ctest entry."""
    listed = subprocess.run(["ctest", "--test-dir", "build", "--show-only=json-v1"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for test in json.loads(listed)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        yield test["name"], test.get("command", []), properties.get("WORKING_DIRECTORY", ROOT)


def list_cases(command):
    """Suite.Case names as GoogleTest lists them, or None for a program that does not list."""
    listed = subprocess.run([*command, "--gtest_list_tests"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if listed.returncode:
        return None
    suite, names = "", []
    for line in listed.stdout.splitlines():
        line = line.split("  # ")[0].rstrip()
        if line.startswith("  "):
            names.append(suite + line.strip())
        elif re.fullmatch(r"[\w/]+\.", line):
            suite = line
    return names


def run_program(name, command, folder, regex, console):
    names = list_cases(command)
    if names is None:
        return [Case(name, "failed", f"{command[0]} does not list its cases")]
    wanted = [case for case in names if regex.search(f"{name}/{case}")]
    if not wanted:
        return []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        report = pathlib.Path(out) / "report.json"
        chosen = [] if len(wanted) == len(names) else ["--gtest_filter=" + ":".join(wanted)]
        scratch = pathlib.Path(out) / "tmp"
        scratch.mkdir()
        environment = {**os.environ, **FEW_THREADS, "TEST_TMPDIR": f"{scratch}/", "TMPDIR": str(scratch)}
        code = run([*command, *chosen, f"--gtest_output=json:{report}"], console, name, PROGRAM_SECONDS, cwd=folder, environment=environment)
        cases = []
        if report.exists():
            for suite in json.loads(report.read_text())["testsuites"]:
                for case in suite["testsuite"]:
                    if case.get("status") != "RUN":
                        continue
                    failures = case.get("failures", [])
                    skipped = case.get("result") == "SKIPPED"
                    text = failures[0]["failure"] if failures else case.get("skipped", [{}])[0].get("message", "") if skipped else ""
                    cases.append(Case(f"{name}/{suite['name']}.{case['name']}", "failed" if failures else "skipped" if skipped else "passed", text))
    if code and not any(case.result == "failed" for case in cases):
        cases.append(Case(name, "failed", f"the program ended with {code}" + (" (out of time)" if code == -signal.SIGKILL else "") + " and names no failed case"))
    return cases


def run_programs(regex, console):
    cases = []
    for name, command, folder in programs():
        begun = time.monotonic()
        done = run_program(name, command, folder, regex, console) if command else [Case(name, "failed", "not built")]
        cases += done
        if done:
            counts = collections.Counter(case.result for case in done)
            console.show(f"  {name}: " + ", ".join(f"{count} {result}" for result, count in sorted(counts.items())) + f" in {time.monotonic() - begun:.1f} s")
    return cases


def run_lane(number, regex, console, shared):
    """One pytest process over the files that no other has taken; its cases, and seconds by file."""
    report = shared / f"report-{number}.xml"
    environment = {**os.environ, **FEW_THREADS, "PYTHONPATH": f"{ROOT}/tests", "PPFT_TEST_REGEX": regex.pattern, "PPFT_TEST_LANES": str(shared), "HF_HUB_OFFLINE": "1",
                   "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": f"{shared}/inductor"}  # else torch asks for the user's name, which not every container has
    # The folders of cases that passed go at once, the others with the run: together they would take a gigabyte.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "lanes", "-q", "--tb=short", "-rfEs", f"--junitxml={report}", "-o", "junit_family=xunit1",
               f"--basetemp={shared}/files-{number}", "-o", "tmp_path_retention_policy=failed", "tests"]
    telling, last_words = False, []

    def shown(line):
        nonlocal telling
        telling = telling or re.fullmatch(r"=+ (FAILURES|ERRORS) =+\n?", line) is not None
        if telling:
            last_words.append(line)
        return not telling and re.fullmatch(r"  tests/\S+: .* in [\d.]+ s\n?", line) is not None

    code = run(command, console, f"pytest-{number}", PYTHON_SECONDS, environment=environment, shown=shown)
    if code and last_words:
        console.show("".join(last_words))
    cases, seconds = [], collections.Counter()
    if report.exists():
        for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
            file = case.get("file") or case.get("classname")
            seconds[file] += float(case.get("time") or 0)
            bad = [child for child in case if child.tag in ("failure", "error")]
            skip = case.find("skipped")
            problem = bad[0] if bad else skip
            cases.append(Case(f"{file}::{case.get('name')}", "failed" if bad else "skipped" if skip is not None else "passed", "" if problem is None else problem.get("message") or ""))
    if code not in (0, 5) and not any(case.result == "failed" for case in cases):
        cases.append(Case("pytest", "failed", f"pytest ended with {code} and names no failed case"))
    return cases, seconds


def number_in(path, otherwise):
    """The first number of a file of the control group; what it says instead of one is no limit."""
    try:
        return int(pathlib.Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return otherwise


def usable_gib():
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1]) << 10
    group = number_in("/sys/fs/cgroup/memory.max", free)
    return min(free, group) / 2**30


def number_of_lanes(cores, gib):
    by_cores = 1 if cores == 1 else max(2, min(4, cores // 2))
    return max(1, min(by_cores, int(gib / LANE_GIB)))


def run_all(regex, console):
    """Cases of all programs and files."""
    lanes = number_of_lanes(len(os.sched_getaffinity(0)), usable_gib())
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    cases, problems, lock = [], [], threading.Lock()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as shared:
        (pathlib.Path(shared) / "times.json").write_text(json.dumps(times))

        def lane(number):
            try:
                done = run_programs(regex, console) if number == 0 else []
                of_python, seconds = run_lane(number, regex, console, pathlib.Path(shared))
                with lock:
                    cases.extend(done + of_python)
                    times.update(seconds)
            except BaseException as error:
                problems.append(error)
                RUNNING.end()

        threads = [threading.Thread(target=lane, args=[number]) for number in range(lanes)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            RUNNING.end()
    if problems:
        raise problems[0]
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    TIMES.write_text(json.dumps(times, indent=1, sort_keys=True))
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--regex", default="")
    arguments = parser.parse_args()
    try:
        regex = re.compile(arguments.regex)
    except re.error as error:
        sys.exit(f"'{arguments.regex}' is no regular expression: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(arguments.log, "a") as log:
        cases = run_all(regex, Console(log))
        counts = collections.Counter(case.result for case in cases)
        lines = [f"skipped: {case.name}: {case.text.strip()}" for case in cases if case.result == "skipped"]
        lines += [f"FAILED: {case.name}: {case.text.strip()[:600]}" for case in cases if case.result == "failed"]
        if counts["failed"]:
            lines.append(f"what to do: look into {arguments.log}, then run one again with: tests/run 'NAME'")
        if not cases:
            lines.append(f"no case matches '{arguments.regex}'" if arguments.regex else "no case was found")
        lines.append(f"{counts['passed']} passed, {counts['failed']} failed" + (f", {counts['skipped']} skipped" if counts["skipped"] else ""))
        text = "\n".join(lines)
        print("\n" + text, flush=True)
        log.write(text + "\n")
    sys.exit(1 if counts["failed"] or not counts["passed"] else 0)


if __name__ == "__main__":
    main()
