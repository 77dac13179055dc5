"""examples/dynamo/kv_routing.sh, and the script that verifies. Run by `make test-dynamo`; not collected by `make test`,
since the installation takes some 4 GB."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from dynamo_rig import BLOCK, EXAMPLES, Deployment, deployed, prompt, total


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed("kv_routing.sh", tmp_path_factory.mktemp("kv_routing")) as deployment:
        yield deployment


def test_what_one_worker_has_computed_another_loads(deployment: Deployment) -> None:
    text = prompt()
    loads, external = deployment.loads(), sum(deployment.external_by_worker())
    first = deployment.ask(text)
    assert (first.cached, deployment.loads() - loads) == (0, 0)
    (other,) = set(deployment.workers()) - {first.worker}
    second = deployment.ask(text, other)
    assert second.worker == other
    assert second.cached == (first.prompt - 1) // BLOCK * BLOCK
    assert second.text == first.text
    assert deployment.loads() - loads == 1
    assert sum(deployment.external_by_worker()) - external == second.cached


def test_the_router_hears_what_its_workers_hold(deployment: Deployment) -> None:
    texts = [prompt() for _ in range(4)]
    firsts = [deployment.ask(text) for text in texts]
    seconds = [deployment.ask(text) for text in texts]
    assert [answer.expected for answer in firsts] == [0.0] * 4
    assert all(answer.expected > 0.9 for answer in seconds)
    assert [answer.worker for answer in seconds] == [answer.worker for answer in firsts]
    metrics = deployment.get("/metrics")
    assert total(metrics, "dynamo_component_kv_cache_events_applied", event_type="stored", status="ok") > 0


def test_the_script_that_verifies(deployment: Deployment) -> None:
    """A worker's own cache loses the prompt to others and gets it back from FlexKV."""
    hits = deployment.flexkv()["tiers"]["cpu"]["hit_blocks"]
    ran = subprocess.run(
        ["bash", str(EXAMPLES / "verify"), "64"], env=deployment.environ, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^external hit: \d+ of \d+ prompt tokens", ran.stdout, re.MULTILINE), ran.stdout
    assert deployment.flexkv()["tiers"]["cpu"]["hit_blocks"] > hits
    print(ran.stdout)
