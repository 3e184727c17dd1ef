"""A pytest plugin: notes how every test of a foreign suite came out, and leaves out those that the list says not to run.

Outcomes: `passed`; `failed`; `text`, where all holds but the very words of a model that is not ours; `internal`, where the test
reaches for the other project's own code instead of the server; `skipped`, as the suite itself says; `left out`.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lists  # noqa: E402

RESULTS = {}
LIST = lists.List.load(os.environ["FOREIGN_LIST"])


class Internal(Exception):
    """A test wants the other project's own code."""


class Missing(Exception):
    """A test wants the server started with an option that has no counterpart."""


class Words:
    """Texts that a test expects of its own model, and that another model did not write."""

    missed: list[str] = []


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        name = lists.plain(item.nodeid)
        leave = item.get_closest_marker("slow") or not LIST.runs(name)
        if leave and not os.environ.get("FOREIGN_ALL"):
            RESULTS[name] = {"outcome": "left out", "words": ""}
            left_out.append(item)
        else:
            kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collectreport(report):
    if report.failed:
        RESULTS[lists.plain(report.nodeid)] = {"outcome": "not collected", "words": tail(str(report.longrepr))}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    report = result.get_result()
    name = lists.plain(item.nodeid)
    if call.excinfo is not None:
        kind = call.excinfo.type
        outcome = "skipped" if report.skipped else "internal" if issubclass(kind, Internal) else "failed"
        words = f"{kind.__name__}: {call.excinfo.value}"
        if outcome == "failed" and issubclass(kind, AssertionError):
            words = f"line {call.excinfo.traceback[-1].lineno + 1}: {words}"
        RESULTS.setdefault(name, {"outcome": outcome, "words": tail(words)})
    elif call.when == "setup":
        Words.missed = []
    elif call.when == "call":
        outcome = "text" if Words.missed else "passed"
        RESULTS.setdefault(name, {"outcome": outcome, "words": tail("; ".join(Words.missed))})
    # Written as it goes: a run that is stopped still says how far it came.
    Path(os.environ["FOREIGN_RESULTS"]).write_text(json.dumps(RESULTS, indent=1))


def pytest_sessionfinish():
    Path(os.environ["FOREIGN_RESULTS"]).write_text(json.dumps(RESULTS, indent=1))
    from mesh import POOL

    POOL.stop()


def tail(words):
    return re.sub(r"\s+", " ", words)[:600]
