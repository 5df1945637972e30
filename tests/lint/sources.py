"""The project's own files."""
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def sources(*endings):
    """Paths from the root, tracked and new, as text; build outputs and what git ignores are left out."""
    listed = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for path in set(listed.splitlines()) if path.endswith(endings) and (ROOT / path).is_file())
