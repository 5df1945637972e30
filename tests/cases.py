"""Runs every C++ and Python case of the built tree and closes with one line of counts. Called by tests/run; exit code 1 when a case failed or none ran."""
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
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM_SECONDS, PYTHON_SECONDS = 900, 3600
Case = collections.namedtuple("Case", "name result text")  # result: passed | failed | skipped


def run(command, log, seconds, show=False, cwd=ROOT, environment=None):
    """Exit code; output goes to the log (and to the terminal). A command past its time is killed with its children."""
    with subprocess.Popen(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          start_new_session=True) as process:
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.alarm(seconds)
        try:
            for line in process.stdout:
                log.write(line)
                if show:
                    sys.stdout.write(line)
                    sys.stdout.flush()
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            signal.alarm(0)
            log.flush()
    return code


def programs():
    """(name, command, folder) of each ctest entry."""
    listed = subprocess.run(["ctest", "--test-dir", "build", "--show-only=json-v1"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for test in json.loads(listed)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        yield test["name"], test.get("command", []), properties.get("WORKING_DIRECTORY", ROOT)


def list_cases(command):
    """Suite.Case names as GoogleTest lists them, or None for a program that does not list."""
    listed = subprocess.run([*command, "--gtest_list_tests"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
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


def run_program(name, command, folder, regex, log):
    names = list_cases(command)
    if names is None:
        return [Case(name, "failed", f"{command[0]} does not list its cases")]
    wanted = [case for case in names if regex.search(f"{name}/{case}")]
    if not wanted:
        return []
    with tempfile.TemporaryDirectory() as out:
        report = pathlib.Path(out) / "report.json"
        chosen = [] if len(wanted) == len(names) else ["--gtest_filter=" + ":".join(wanted)]
        code = run([*command, *chosen, f"--gtest_output=json:{report}"], log, PROGRAM_SECONDS, cwd=folder)
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


def run_python(regex, log):
    with tempfile.TemporaryDirectory() as out:
        report = pathlib.Path(out) / "report.xml"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests", "PPFT_TEST_REGEX": regex.pattern, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "name_filter", "-q", "--tb=short", "-rfEs", f"--junitxml={report}", "-o", "junit_family=xunit1", "tests"]
        code = run(command, log, PYTHON_SECONDS, show=True, environment=environment)
        cases = []
        if report.exists():
            for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
                name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
                bad = [child for child in case if child.tag in ("failure", "error")]
                skip = case.find("skipped")
                problem = bad[0] if bad else skip
                cases.append(Case(name, "failed" if bad else "skipped" if skip is not None else "passed", "" if problem is None else problem.get("message") or ""))
    if code not in (0, 5) and not any(case.result == "failed" for case in cases):
        cases.append(Case("pytest", "failed", f"pytest ended with {code} and names no failed case"))
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
    cases = []
    with open(arguments.log, "a") as log:
        for name, command, folder in programs():
            begun = time.monotonic()
            if not command:
                done = [Case(name, "failed", "not built")]
            else:
                done = run_program(name, command, folder, regex, log)
            cases += done
            if done:
                counts = collections.Counter(case.result for case in done)
                print(f"  {name}: " + ", ".join(f"{count} {result}" for result, count in sorted(counts.items())) + f" in {time.monotonic() - begun:.1f} s", flush=True)
        cases += run_python(regex, log)
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
