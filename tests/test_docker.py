"""The image and what Runpod reads of it, as far as files can be checked without building."""

import asyncio
import importlib.util
import json
import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

from dust3r_sfm.serving.limits import PREFIX, Limits
from dust3r_sfm.serving.request import parse_request

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@pytest.fixture
def handler(monkeypatch):
    """The handler's module; the calls of Runpod's package that it makes are kept."""
    sent = []
    runpod = types.ModuleType("runpod")
    runpod.serverless = types.ModuleType("runpod.serverless")
    runpod.serverless.progress_update = lambda job, progress: sent.append((job["id"], progress))
    monkeypatch.setitem(sys.modules, "runpod", runpod)
    monkeypatch.setitem(sys.modules, "runpod.serverless", runpod.serverless)
    spec = importlib.util.spec_from_file_location("handler", ROOT / "docker" / "runpod" / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.sent = sent
    return module


def test_what_the_image_copies_is_there_and_not_ignored():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    paths = [path.removeprefix("./") for line in copied for path in line.split()]
    assert len(paths) > 5
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in paths:
        assert (ROOT / path).exists()
        assert path.split("/")[0] in kept


def test_the_image_installs_extras_that_exist_and_runs_as_a_user():
    (extras,) = re.findall(r'pip install --no-cache-dir "\.\[(.+)\]"', DOCKERFILE)
    known = re.findall(r"^(\w+) =", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1], re.MULTILINE)
    assert set(extras.split(",")) <= set(known)
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.MULTILINE)
    assert (ROOT / "docker" / "entrypoint.sh").stat().st_mode & 0o111
    assert "nvidia/cuda" in DOCKERFILE
    assert (ROOT / ".runpod" / "Dockerfile").read_text() == DOCKERFILE


def test_the_image_has_what_triton_builds_its_launchers_with():
    run_time = DOCKERFILE.split("\nFROM ")[-1]
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(re.search(r"apt-get install(.*)", run_time)[1].split())


def test_the_settings_that_runpod_offers_are_those_that_the_worker_reads():
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())
    offered = {setting["key"]: setting["input"] for setting in hub["config"]["env"]}
    own = {f"{PREFIX}{field.name.upper()}": field.default for field in fields(Limits)}
    assert set(offered) - set(own) == {"DUST3R_SFM_CONCURRENCY"}
    assert set(own) - set(offered) == {"DUST3R_SFM_VOLUME", "DUST3R_SFM_SCRATCH"}
    for key in set(own) & set(offered):
        assert offered[key]["default"] == own[key]
        assert offered[key]["name"]
        assert offered[key]["description"]
    for preset in hub["config"]["presets"]:
        assert set(preset["defaults"]) <= set(offered)
    assert {"title", "description", "type", "category"} <= set(hub)


def test_the_jobs_that_runpod_tests_are_requests():
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())
    assert tests["tests"]
    for test in tests["tests"]:
        parse_request(test["input"])


def test_the_handler_answers_a_bad_job_with_a_sentence(handler, monkeypatch):
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/job-done")
    answer = asyncio.run(handler.handler({"id": "7", "input": {"volume_path": "castle", "output_path": "out"}}))
    assert answer == {"error": "this worker has no volume: send addresses", "code": "input"}
    assert asyncio.run(handler.handler({"id": "8"}))["code"] == "input"
    assert handler.sent == []


def test_stages_are_sent_only_where_runpod_listens(handler, monkeypatch):
    monkeypatch.setenv("DUST3R_SFM_MAX_SECONDS", "0")
    job = {"id": "7", "input": {"images": ["https://10.0.0.1/a.jpg"] * 2, "output_url": "https://10.0.0.1/out"}}
    assert asyncio.run(handler.handler(job))["code"] in ("input", "time")
    handler.tell({"id": "7"}, "load")
    assert handler.sent == []
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/job-done")
    handler.tell({"id": "7"}, "load")
    assert handler.sent == [("7", {"stage": "load"})]
