"""The conformance suite finds what is wrong with bad backends, by the name of the duty, and nothing with sound ones.

Counts are small and only some duties are run; FLEXKV_SOAK=1 runs all duties on each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

BAD = Path(__file__).parent / "bad_backends"
SOAK = os.environ.get("FLEXKV_SOAK") == "1"
SOUND = [*(["sound"] if SOAK else []), "sound_slots", "sound_submit"]
"""In CI the directory backend, which has its own run of the suite, is the sound one with keys."""

DUTY: dict[str, tuple[set[str], set[str], str]] = {
    # name: duties one of which must be named, further ones that may be, tests that are run
    "other_key": ({"identity"}, {"list", "delete"}, "identity_of_keys_that"),
    "short_write": ({"short-writes"}, set(), "short_writes"),
    "probe_remembers": ({"probe"}, {"short-writes"}, "probe_after"),
    "forgets": ({"persistence"}, {"kill", "close", "open-twice", "list", "short-writes"}, "persistence"),
    "close_hangs": ({"close"}, set(), "close_of_an_idle or persistence"),
    "swallows": ({"short-writes"}, set(), "short_writes"),
    "probe_counts": ({"probe"}, set(), "leading"),
    "forgets_late": ({"kill"}, set(), "test_kill"),
    "close_crashes": ({"close"}, set(), "close_with"),
    "ignores_group": ({"identity"}, {"delete", "list", "probe"}, "identity_of_groups"),
    "status_order": ({"statuses"}, {"identity", "probe"}, "statuses_of_what"),
    "beyond_block": ({"only-what-was-asked"}, {"concurrency"}, "host_region"),
    "late_reader": ({"identity"}, {"open-twice", "throughput"}, "identity_when"),
    "delete_nothing": ({"delete"}, {"probe", "list", "concurrency"}, "delete_forgets"),
    "delete_too_much": ({"delete"}, {"list"}, "delete_forgets"),
    "list_omits": ({"list"}, {"kill"}, "list_is"),
    "list_twice": ({"list"}, set(), "list_is"),
    "write_behind": ({"kill"}, {"short-writes", "close", "concurrency"}, "test_kill"),
    "torn": ({"kill"}, {"concurrency"}, "test_kill"),
    "unsafe_threads": ({"concurrency"}, {"statuses"}, "concurrency"),
    "short_read": ({"statuses"}, set(), "statuses_of_another"),
    "leaks_files": ({"leaks"}, set(), "leaks_while"),
    "leaks_threads": ({"leaks"}, set(), "leaks_after"),
    "missing_ok": ({"statuses"}, {"identity", "probe", "delete", "concurrency"}, "statuses_of_what"),
    "no_lock": ({"open-twice"}, {"kill"}, "open_twice"),
    "big_batch": ({"statuses", "batches"}, {"identity", "persistence", "list"}, "batches_of_every"),
    "dies_on_large": ({"batches"}, set(), "batches_of_mixed"),
    "read_hangs": ({"statuses"}, {"probe", "delete", "list"}, "statuses_of_what"),
    "reads_once": ({"statuses", "identity"}, {"batches", "delete", "open-twice"}, "identity_of_many"),
    "slot_spills": ({"only-what-was-asked"}, {"identity", "statuses", "concurrency"}, "on_the_medium"),
    "slot_seeks": ({"concurrency"}, {"identity"}, "concurrency"),
    "done_twice": ({"submit"}, set(), "submit or leaks_while"),
    "done_never": ({"submit"}, {"statuses", "probe", "delete", "list"}, "submit or statuses_of_what"),
    "recovers_stale": ({"recovery"}, set(), "recovery"),
}
EVERYWHERE = {
    *("identity", "statuses", "only-what-was-asked", "concurrency", "short-writes"),
    *("persistence", "kill", "close", "damage", "leaks"),
}
"""What a backend that mixes up, loses or hangs on blocks breaks in passing: duties whose tests use all of a backend.
Only looked at with all duties."""

SOUND_IN_CI = "recovery or kill or short or concurrency or medium or open_twice or in_flight or submit or leaks_after"

SUITE = """
from flexkv_core.testing import BackendConformance


class TestIt(BackendConformance):
    backend = "{name}"
    many = 300
    largest = 2 << 20
    kill_rounds = 12
    deadline_s = {deadline}
    close_deadline_s = {close}

    def make_config(self, directory):
        return {{"root": directory}}
"""


def run(site: Path, name: str, chosen: str) -> dict[str, str]:
    """Run the suite on one backend in a pytest of its own: {test: failure, "" if it passed or was skipped}."""
    file, report = site / f"test_{sorted(BAD.glob('*.py')).index(BAD / f'{name}.py')}.py", site / f"{name}.xml"
    file.write_text(
        SUITE.format(
            name=name,
            deadline=2 if name in ("read_hangs", "done_never") else 30,
            close=1 if name == "close_hangs" else 10,
        )
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", site, file]
    command += [f"--junitxml={report}", *(["-k", chosen] if chosen else [])]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{BAD}", "FLEXKV_SOAK": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False, cwd=site)
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [each.text or "" for each in case if each.tag in ("failure", "error")]
        found[case.get("name", "")] = "\n".join(failures)
    assert found, done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them as installed plug-ins."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "bad_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-backends\nVersion: 1.0\n")
    names = sorted(path.stem for path in BAD.glob("*.py"))
    lines = "".join(f"{name} = {name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[flexkv.backends]\n{lines}")
    return folder


@pytest.fixture(scope="module")
def results(site: Path) -> dict[str, dict[str, str]]:
    """What the suite says of each, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(run, site, name, "" if SOAK else chosen) for name, (_, _, chosen) in DUTY.items()}
        return {name: each.result() for name, each in runs.items()}


def test_every_bad_backend_is_in_the_table() -> None:
    assert {path.stem for path in BAD.glob("*.py")} == {*DUTY, "sound", "sound_slots", "sound_submit"}


@pytest.mark.soak
@pytest.mark.parametrize("name", DUTY)
def test_a_bad_backend_fails_by_the_name_of_its_duty(name: str, results: dict[str, dict[str, str]]) -> None:
    must, may, _ = DUTY[name]
    failures = {test: text for test, text in results[name].items() if text}
    assert failures, f"nothing was found wrong in {sorted(results[name])}"
    named: set[str] = set()
    for test, text in failures.items():
        found = re.findall(r'duty "([a-z-]+)" is broken by backend', text)
        assert found, (test, text)
        named |= set(found)
        assert f"'{name}'" in text
        assert re.search(r"FLEXKV_SEED=\d+ pytest '.*::test_\w+", text), text
    assert named & must, failures
    assert named <= must | may | (EVERYWHERE if SOAK else set()), failures


@pytest.mark.soak
@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_wrong_with_a_sound_one(name: str, site: Path) -> None:
    chosen = "" if SOAK else SOUND_IN_CI
    failures = {test: text for test, text in run(site, name, chosen).items() if text}
    assert not failures, "\n\n".join(failures.values())
