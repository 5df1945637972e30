import os
import pathlib
import re
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from sources import ROOT, sources


def test_clang_format_would_change_nothing():
    files = sources(".h", ".cc", ".cu", ".cuh")
    assert files
    run = subprocess.run(["clang-format-14", "--dry-run", *files], cwd=ROOT, capture_output=True, text=True)
    wrong = sorted({line.split(":")[0] for line in run.stderr.splitlines() if "-Wclang-format-violations" in line})
    assert not wrong, "run: clang-format-14 -i " + " ".join(wrong)
    assert run.returncode == 0, run.stderr


def test_buf_lint_is_clean(tmp_path):
    buf = ROOT / ".deps/npm/node_modules/.bin/buf"
    assert buf.exists() or shutil.which("buf"), "buf is missing: run deploy/setup --oracle"
    run = subprocess.run([buf if buf.exists() else "buf", "lint"], cwd=ROOT / "proto", env={**os.environ, "BUF_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_shell_scripts_parse():
    scripts = [path for path in sources("") if re.match(r"#!.*\b(ba)?sh\b", first_line(ROOT / path)) or path.endswith(".sh")]
    assert {"deploy/setup", "deploy/local", "deploy/quickstart", "tests/run"} <= set(scripts)
    for path in scripts:
        run = subprocess.run(["bash", "-n", path], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    places = [f"{path}:{number}" for path in sources(".h", ".cc", ".cu", ".proto", ".py", ".rs", ".txt", ".md") if path != "tests/lint/test_format.py"
              for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1) if marks.search(line)]
    assert not places, ", ".join(places)


def first_line(path):
    with open(path, "rb") as file:
        return file.readline(200).decode(errors="replace")
