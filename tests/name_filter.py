"""A pytest plugin: keeps the cases whose name matches the regular expression in PPFT_TEST_REGEX."""
import os
import re


def pytest_collection_modifyitems(config, items):
    regex = re.compile(os.environ.get("PPFT_TEST_REGEX", ""))
    dropped = [item for item in items if not regex.search(item.nodeid)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if regex.search(item.nodeid)]
