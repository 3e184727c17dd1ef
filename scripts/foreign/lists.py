"""The committed list of a foreign suite: what every test of it shows, and why some show nothing.

    [suite]
    package = "NAME"            where the suite comes from
    version = "VERSION"

    passed = ["FILE::TEST[PARAMETERS]", ...]

    [[fault]]                   the answer is wrong; there must be none
    [[missing]]                 asks for a feature that does not exist here
    [[not_applicable]]          cannot say anything about us
    reason = "..."
    tests = ["FILE::TEST", ...] `*` stands for any characters
    run = false                 only where a run would be of no use, such as one that wants a model of its own
    shows = "..."               a regular expression that the failure must match, so that another failure is not taken for it
    may_pass = true             where it depends on the words of a model or on timing
"""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("passed", "fault", "missing", "not_applicable")
FAILING = {"failed", "text", "internal", "skipped", "not collected"}


def plain(nodeid):
    """A test's name as it stands in a list."""
    return nodeid.encode("ascii", "backslashreplace").decode()


@dataclass
class Entry:
    """One group of tests."""

    kind: str
    tests: list
    reason: str = ""
    run: bool = True
    shows: str = ""
    may_pass: bool = False
    seen: set = field(default_factory=set)

    def judge(self, outcome, words):
        """Why this outcome contradicts the list, or None."""
        if self.kind == "passed":
            return None if outcome == "passed" else f"{outcome}: {words}"
        if not self.run or outcome == "left out":
            return None
        if outcome == "passed":
            return None if self.may_pass else f"passes, although it is listed as {self.kind}: {self.reason}"
        if self.shows and not re.search(self.shows, words):
            return f"fails otherwise than listed ({self.shows}): {words}"
        return None


@dataclass
class List:
    """A whole list."""

    suite: dict
    entries: list

    @classmethod
    def load(cls, path):
        """Reads a list; unknown keys are errors."""
        table = tomllib.loads(Path(path).read_text())
        entries = [Entry("passed", table.pop("passed", []))]
        suite = table.pop("suite")
        for kind in KINDS[1:]:
            entries += [Entry(kind, **group) for group in table.pop(kind, [])]
        if table:
            raise ValueError(f"{path}: unknown keys {', '.join(table)}")
        return cls(suite, entries)

    def find(self, name):
        """The entry of a test: an exact name first, then patterns in their order."""
        for entry in self.entries:
            if name in entry.tests:
                entry.seen.add(name)
                return entry
        for entry in self.entries:
            for pattern in entry.tests:
                if "*" in pattern and re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL):
                    entry.seen.add(pattern)
                    return entry
        return None

    def runs(self, name):
        """Whether a test is run at all."""
        entry = self.find(name)
        return entry is None or entry.run

    def compare(self, results, partial=False):
        """Counts by kind, and what contradicts the list."""
        counts = dict.fromkeys(KINDS, 0)
        wrong = []
        for name, result in sorted(results.items()):
            entry = self.find(name)
            if entry is None:
                wrong.append(f"{name}: not in the list ({result['outcome']}: {result['words']})")
                continue
            counts[entry.kind] += 1
            if entry.kind == "fault":
                wrong.append(f"{name}: a fault: {entry.reason}")
            elif problem := entry.judge(result["outcome"], result["words"]):
                wrong.append(f"{name}: {problem}")
        for entry in [] if partial else self.entries:
            for name in entry.tests:
                if name not in entry.seen:
                    wrong.append(f"{name}: listed as {entry.kind}, but the suite has no such test")
        return counts, wrong
