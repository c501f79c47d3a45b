"""Break the product in one place at a time, and see whether a test notices: `make mutants`.

tools/README.md explains how this works and what to do with a mutant that no test kills.
"""
import argparse
import contextlib
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from keyword import iskeyword
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

from mutations import TOP, Finder, Marker, Mutant

MODULES = ["publisher.py", "sse_server.py",
           *(str(path.relative_to(TOP)) for path in sorted((TOP / "sse_core").rglob("*.py")))]
SHARE, FEWEST, MOST = 0.1, 10, 40       # of the sites of a module, unless --per-module says it
SLOWER, SLACK = 3, 20   # a test is killed by time after so many times its own, and so many seconds
LONGEST = 1200          # seconds for all tests
NOTHING_RUN = 5         # as pytest says it: a mutant can give tests other names
PATIENCE = 8            # seconds, in place of those of tests/helpers.py, for what never comes
SWITCH_INTERVAL = "1e-6"        # seconds, for mutants without a lock
EQUIVALENT = TOP / "tools" / "equivalent_mutants.txt"


class Copy:
    """A copy of the tree, in which one thing runs at a time."""

    def __init__(self, folder: Path) -> None:
        self._tree, self._scratch, self._files = folder / "t", folder / "s", folder / "f"
        self.marks = self._files / "marks"
        self._files.mkdir(parents=True)
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP,
                               check=True, capture_output=True, text=True).stdout.splitlines()
        for name in names:
            if (TOP / name).is_file():
                (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(TOP / name, self._tree / name)
        helpers = self._tree / "tests" / "helpers.py"
        helpers.write_text(re.sub(r"(?m)^PATIENCE = [0-9.]+", f"PATIENCE = {PATIENCE}",
                                  helpers.read_text()))

    def write(self, module: str, source: bytes) -> None:
        path = self._tree / module
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()       # it counts as new if the size and the second are the same
        path.write_bytes(source)

    def leave_marks(self) -> List[Tuple[str, str, List[str]]]:
        """Have all modules leave marks, from the next run on."""
        marker = Marker()
        for module in MODULES:
            text = (TOP / module).read_text()
            self.write(module, marker.mark(module, text).encode())
        self.marks.write_bytes(bytes(len(marker.places)))
        self.write("sse_core/__init__.py", (TOP / "sse_core" / "__init__.py").read_bytes() + (
            f"import mmap\nwith open({str(self.marks)!r}, 'r+b') as _file:\n"
            "    _marks = mmap.mmap(_file.fileno(), 0)\n").encode())
        return marker.places

    def run(self, arguments: List[str], timeout: float, **order: Any
            ) -> Tuple[int, List[Dict[str, Any]], str]:
        """Run pytest. Returns its status, -1 after so many seconds; the notes; what it wrote."""
        self._scratch.mkdir()
        files = {name: str(self._files / name) for name in ("order", "notes", "output")}
        Path(files["order"]).write_text(json.dumps({
            "tests": None, "limits": {}, "marks": None, **order, "arguments": arguments,
            "notes": files["notes"]}))
        Path(files["notes"]).write_text("")
        try:
            with open(files["output"], "wb") as output:
                status = subprocess.run(
                    [sys.executable, "tools/mutant_run.py", files["order"]],
                    cwd=self._tree, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                    timeout=timeout,
                    env={**os.environ, "TMPDIR": str(self._scratch)}).returncode
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            self.end()
        notes = [json.loads(line) for line in Path(files["notes"]).read_text().splitlines()]
        return status, notes, Path(files["output"]).read_text(errors="replace")

    def end(self) -> None:
        """Kill all that runs in here, also what a test left in a session of its own."""
        mark = f"TMPDIR={self._scratch}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        shutil.rmtree(self._scratch, ignore_errors=True)


# What runs outside: record, choose, judge, report


def quick_tests() -> List[str]:
    """Return which tests are no quick ones, for pytest; with Redis here, its tests are quick."""
    told = subprocess.run(["make", "-n", "shuffle"], cwd=TOP, check=True, capture_output=True,
                          text=True).stdout
    ignored = re.findall(r"--ignore=\S+", told)
    assert ignored, f"what are the quick tests? {told}"
    has_redis = bool(shutil.which("redis-server"))
    return [each for each in ignored if not (has_redis and "test_redis" in each)]


class Record:
    """Which tests run which statements, and for how long."""

    def __init__(self, places: List[Any], notes: List[Dict[str, Any]]) -> None:
        done = [note for note in notes if "done" in note]
        self.seconds = {note["done"]: note["seconds"] for note in done if note["done"]}
        self._names: Dict[str, Set[str]] = defaultdict(set)     # tests, by a name in a statement
        self._tests: Dict[str, Set[str]] = defaultdict(set)     # and by module and place
        self._kills: Counter = Counter()
        at_import = done[0]["marks"]
        for note in done[1:]:
            for number in {*note["marks"], *at_import}:
                module, place, names = places[number]
                for key in (f"{module}:{place}", module):
                    self._tests[key].add(note["done"])
                for name in names if number in note["marks"] else ():
                    self._names[name].add(note["done"])

    def tests_of(self, mutant: Mutant) -> List[str]:
        """Return the tests that run a mutant, those that find most in the least time first."""
        if mutant.place[0] == "=":
            tests = set().union(*(self._names.get(name, ()) for name in mutant.place[1:].split()))
            tests = tests or self._tests[mutant.module]
        else:
            tests = self._tests[f"{mutant.module}:{mutant.place}"]
        is_lock = mutant.operator == "lock"
        is_redis = mutant.module in ("sse_core/stores/redis.py", "sse_core/stores/store.py")
        return sorted((test for test in tests if is_redis or "test_redis" not in test), key=lambda
                      test: (not (is_lock and "test_locks" in test),
                             (self.seconds[test] + 0.02) / (1 + self._kills[test])))

    def killed(self, test: str) -> None:
        self._kills[test] += 1


def record(copy: Copy, arguments: List[str]) -> Record:
    """Run all tests in a copy that leaves marks; what was recorded of the same tree is kept."""
    digest = hashlib.sha256(repr((arguments, sys.version, [
        path.read_bytes() for path in sorted([*TOP.glob("*.py"), *TOP.rglob("sse_core/**/*.py"),
                                              *TOP.glob("tests/*.py")])])).encode()).hexdigest()
    kept = TOP / "build" / f"mutants-{digest[:16]}.json"
    if not kept.exists():
        print("recording which tests run which statements", flush=True)
        places = copy.leave_marks()
        status, notes, output = copy.run(arguments, LONGEST, marks=str(copy.marks))
        for module in MODULES:
            copy.write(module, (TOP / module).read_bytes())
        if status:
            sys.exit(f"{output}\nthe tests fail without a mutant, too")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([places, notes]))
    return Record(*json.loads(kept.read_text()))


def attempt(copy: Copy, mutant: Mutant, recorded: Record, tests: List[str], is_broken: bool
            ) -> Tuple[int, List[Dict[str, Any]]]:
    """Run tests until one fails, with the mutant or without. Returns pytest's status; notes."""
    arguments = ["-x", "-q", *dict.fromkeys(test.split("::")[0] for test in tests)]
    if mutant.operator == "lock":
        arguments += ["--switch-interval", SWITCH_INTERVAL]
    limits = {test: SLOWER * recorded.seconds[test] + SLACK for test in tests}
    timeout = sum(limits.values()) - SLACK * (len(tests) - 3)       # and the begin and end
    if is_broken:
        copy.write(mutant.module, mutant.source())
    try:
        return copy.run(arguments, timeout, tests=tests, limits=limits)[:2]
    finally:
        copy.write(mutant.module, (TOP / mutant.module).read_bytes())


def judge(copy: Copy, mutant: Mutant, recorded: Record, confirm: bool) -> Tuple[str, str]:
    """Return "killed", "ALIVE" or "UNRUN", and by what.

    confirm: a test that failed must do so again, and not without the mutant; else it is left out.
    """
    tests = recorded.tests_of(mutant)
    if not tests:
        return "UNRUN", "no test runs it"
    by_chance: List[str] = []
    while tests:
        status, notes = attempt(copy, mutant, recorded, tests, True)
        if status in (0, NOTHING_RUN):
            break
        begun = [note["begun"] for note in notes if "begun" in note][-1:]
        if not begun:
            return "killed", "the collection of the tests"
        if not confirm or (attempt(copy, mutant, recorded, begun, True)[0]
                           and not attempt(copy, mutant, recorded, begun, False)[0]):
            recorded.killed(begun[0])
            is_told = any("failed" in note for note in notes)
            return "killed", begun[0] + ("" if is_told else " (time, or a crash)")
        by_chance += begun
        tests = [test for test in tests if test not in begun]
    return "ALIVE", ", ".join([f"{len(tests)} tests", *(f"{each} fails by chance"
                                                        for each in by_chance)])


def equivalents() -> Dict[str, str]:
    """Return the reasons for which mutants are as good as the original, by their key."""
    entries = {}
    for entry in EQUIVALENT.read_text().split("\n\n") if EQUIVALENT.exists() else ():
        lines = [line for line in entry.splitlines() if not line.startswith("#")]
        if lines:
            entries["\n".join(lines[:3])] = " ".join(lines[3:])
    return entries


def shape(entry: str) -> str:
    """Return what is left of an entry's text when its names are taken away."""
    first, *lines = entry.splitlines()
    return "\n".join([first.split()[-1], *(
        re.sub(r"[A-Za-z_]\w*", lambda name: name[0] if iskeyword(name[0]) else "x", line)
        for line in lines)])


def renew() -> List[str]:
    """Rewrite the entries of equivalent mutants whose names have changed; return all others.

    An entry that matches no mutant is rewritten if there is just one mutant of the same shape.
    """
    known = equivalents()
    keys = {mutant.key() for module in MODULES for mutant in Finder(module).mutants}
    lost = []
    for entry in known.keys() - keys:
        alike = [key for key in keys - known.keys() if shape(key) == shape(entry)]
        if len(alike) == 1:
            EQUIVALENT.write_text(EQUIVALENT.read_text().replace(f"{entry}\n", f"{alike[0]}\n"))
        else:
            lost.append("\n\n".join([entry, *(f"perhaps now: {key}" for key in alike[:3])]))
    return lost


def choose(options: argparse.Namespace) -> List[Mutant]:
    """Return a sample of the mutants of each module, and all those without a lock."""
    chosen = []
    for module in MODULES:
        mutants = Finder(module).mutants
        if options.only:
            chosen += [mutant for mutant in mutants if mutant.id == options.only]
        elif not options.module or options.module in (module, Path(module).name):
            wanted = [each for each in mutants if options.operator in (None, each.operator)]
            locks = [mutant for mutant in wanted if mutant.operator == "lock"]
            others = [mutant for mutant in wanted if mutant.operator != "lock"]
            number = options.per_module
            if number is None:
                number = min(MOST, max(FEWEST, round(SHARE * len(others))))
            draw = random.Random(f"{options.seed} {module}")
            chosen += locks + draw.sample(others, min(number, len(others)))
    return chosen


def report(results: List[Dict[str, Any]]) -> None:
    for module in [*dict.fromkeys(result["module"] for result in results), ""]:
        mine = [result for result in results if module in ("", result["module"])]
        counts = Counter(result["verdict"] for result in mine)
        counted = len(mine) - counts["equivalent"]
        print(f"{module or 'all':28} {counts['killed']:4} of {counted:4} killed"
              f" {100 * counts['killed'] // max(1, counted):4} %"
              f"{counts['equivalent']:5} equivalent")
    for result in results:
        if result["verdict"] in ("ALIVE", "UNRUN"):
            print(f"\n{result['id']}: {result['verdict']}, {result['by']}\n{result['key']}")


def run(mutants: List[Mutant], options: argparse.Namespace) -> List[Dict[str, Any]]:
    """Judge mutants, some at a time, and say what becomes of each."""
    known, results = equivalents(), []
    with tempfile.TemporaryDirectory(prefix="pytest-mutants-") as top, \
            open(options.out or os.devnull, "w", buffering=1) as out:
        copies = [Copy(Path(top) / str(number)) for number in range(options.jobs)]
        free: queue.SimpleQueue = queue.SimpleQueue()
        for copy in copies:
            free.put(copy)
        recorded = record(copies[0], options.pytest or quick_tests())

        def run_one(mutant: Mutant) -> Dict[str, Any]:
            copy, began = free.get(), time.monotonic()
            verdict, by = "equivalent", known.get(mutant.key(), "")
            if not by:
                verdict, by = judge(copy, mutant, recorded, options.confirm)
            free.put(copy)
            return {"id": mutant.id, "module": mutant.module, "verdict": verdict, "by": by,
                    "seconds": round(time.monotonic() - began, 1), "key": mutant.key()}
        executor = ThreadPoolExecutor(options.jobs)
        try:
            for result in executor.map(run_one, mutants):
                results.append(result)
                print(json.dumps(result), file=out)
                print(f"{result['verdict']:6} {result['seconds']:6.1f} s  {result['id']}"
                      f"  {result['by']}", flush=True)
        finally:        # an interrupt: nothing is left running
            executor.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.end()
            executor.shutdown()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of the sample (default 1)")
    add("--per-module", type=int, metavar="N", help="mutants of each module, beside its locks")
    add("--module", metavar="NAME", help="only of this one")
    add("--operator", metavar="NAME", help="only such ones: lock, compare, constant ...")
    add("--only", metavar="ID", help="this one, and show what it changes")
    add("--list", action="store_true", help="say which there would be")
    add("--renew", action="store_true",
        help="rewrite the entries of equivalent ones after a rename, and print those that are gone")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time")
    add("--confirm", action="store_true", help="count no test that fails by chance")
    add("--out", metavar="FILE", help="for the results, JSON in lines")
    add("pytest", nargs="*", help="the tests, in place of the quick ones")
    options = parser.parse_args()
    if options.renew:
        sys.exit("\n\n".join(renew()) or None)
    mutants = choose(options)
    if not mutants:
        parser.error("there is no such mutant")
    if options.list or options.only:
        print(*(f"{mutant.id}\n{mutant.key()}" for mutant in mutants), sep="\n\n")
    if not options.list:
        print(f"{len(mutants)} mutants, seed {options.seed}", flush=True)
        report(run(mutants, options))


if __name__ == "__main__":
    main()
