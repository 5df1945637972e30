"""A pytest plugin for several pytest processes that share one run: each takes the next test file that no other has taken.

PPFT_TEST_REGEX: only cases whose name matches. PPFT_TEST_LANES: the folder in which taken files are noted; times.json in it, from earlier runs, puts the longest first.
"""
import collections
import hashlib
import itertools
import json
import os
import pathlib
import re
import time

import pytest

UNKNOWN_SECONDS = 30.0


def pytest_collection_modifyitems(config, items):
    regex = re.compile(os.environ.get("PPFT_TEST_REGEX", ""))
    dropped = [item for item in items if not regex.search(item.nodeid)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if regex.search(item.nodeid)]


def file_of(item):
    return item.nodeid.split("::")[0]


class Files:
    """The files of this run, the longest first, each given out once over all processes."""

    def __init__(self, items, folder):
        self.folder = pathlib.Path(folder)
        times = json.loads((self.folder / "times.json").read_text())
        groups = [(name, list(group)) for name, group in itertools.groupby(items, file_of)]
        self.waiting = collections.deque(sorted(groups, key=lambda group: -times.get(group[0], UNKNOWN_SECONDS)))

    def take(self):
        while self.waiting:
            name, items = self.waiting.popleft()
            try:
                os.close(os.open(self.folder / hashlib.sha256(name.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return name, items
        return None, []


class Outcomes:
    """What the cases of the file under way came to."""

    def __init__(self):
        self.counts = collections.Counter()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    folder = os.environ.get("PPFT_TEST_LANES")
    if not folder or session.testsfailed or session.config.option.collectonly:
        return None
    outcomes = Outcomes()
    session.config.pluginmanager.register(outcomes)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    files = Files(session.items, folder)
    name, items = files.take()
    while name is not None:
        begun, following = time.monotonic(), (None, [])
        outcomes.counts.clear()
        for index, item in enumerate(items):
            last = index + 1 == len(items)
            if last:
                following = files.take()  # late, so that the other processes find work too; before the last case, which must know what comes next
            after = items[index + 1] if not last else following[1][0] if following[1] else None
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.counts.items()))
        reporter.write(f"\n  {name}: {counts} in {time.monotonic() - begun:.1f} s\n")
        name, items = following
    return True
