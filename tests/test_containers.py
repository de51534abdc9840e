"""Dockerfile and docker-compose.yml, without a Docker engine.

The files are read, and each command, path and variable in them is looked up in what it stands for.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml
from redis import Redis
from rq import SimpleWorker

from jobs.settings import Settings, unknown_variables
from tests.house import ROOT, check_ddpm, project


def dockerfile() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) of each instruction, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stage, found = "", []
    for line in filter(str.strip, joined.splitlines()):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            stage = arguments.split(" AS ")[1]
        found.append((stage, instruction, arguments.strip()))
    return found


def instructions(stage: str, name: str) -> list[str]:
    return [arguments for s, i, arguments in dockerfile() if (s, i) == (stage, name)]


def exec_form(arguments: str) -> list[str]:
    """The JSON list of a CMD or HEALTHCHECK: no shell between the signal and the process."""
    command: list[str] = json.loads(arguments[arguments.index("[") :])
    return command


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return content


@pytest.mark.parametrize("stage", ["api", "worker"])
def test_the_images_run_our_commands_without_root(stage: str) -> None:
    (command,) = instructions(stage, "CMD")
    program, *arguments = exec_form(command)
    assert program in project()["scripts"]
    check_ddpm(arguments)
    assert instructions(stage, "USER") == ["ddpm"]
    assert any("useradd" in run and "ddpm" in run for run in instructions("base", "RUN"))


@pytest.mark.parametrize("stage", ["base", "api", "worker"])
def test_every_copied_path_exists_and_is_sent_to_docker(stage: str) -> None:
    sent = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copies = instructions(stage, "COPY")
    assert copies
    for arguments in copies:
        *sources, _ = arguments.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in sent, source


def test_the_images_hold_the_packages_that_their_part_imports() -> None:
    copied = {
        stage: {a.split("/")[0] for a in instructions(stage, "COPY")} for stage in ("api", "worker")
    }
    assert copied == {"api": {"app", "jobs"}, "worker": {"diffusion", "jobs", "worker"}}


def test_the_images_install_extras_that_exist() -> None:
    runs = " ".join(arguments for _, name, arguments in dockerfile() if name == "RUN")
    assert re.findall(r"'\.\[(\w+)\]'", runs) == ["api", "worker"]
    assert {"api", "worker"} <= set(project()["optional-dependencies"])


def test_the_worker_image_is_healthy_only_while_its_worker_is_registered(redis_url: str) -> None:
    (check,) = instructions("worker", "HEALTHCHECK")
    _, *command = exec_form(check)
    environment = {**os.environ, "REDIS_URL": redis_url}

    def healthy() -> bool:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, timeout=60
        )
        return done.returncode == 0

    assert not healthy()
    with Redis.from_url(redis_url) as client:
        worker = SimpleWorker(["ddpm"], connection=client)
        worker.register_birth()  # type: ignore[no-untyped-call]
        assert healthy()
        worker.register_death()  # type: ignore[no-untyped-call]


def test_compose_builds_stages_that_exist() -> None:
    stages = {stage for stage, _, _ in dockerfile()}
    for service in compose()["services"].values():
        if "build" in service:
            assert service["build"]["target"] in stages
            known = {a.split("=")[0] for a in instructions(service["build"]["target"], "ARG")}
            assert set(service["build"].get("args", {})) <= known
        else:
            assert service["image"].startswith("redis:")


def test_compose_mounts_paths_and_volumes_that_exist() -> None:
    content = compose()
    for name, service in content["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir(), f"{name} mounts {source}"
                assert volume.endswith(":ro"), f"{name} could write to {source}"
            else:
                assert source in content["volumes"], f"{name} mounts {source}"


def variables(stage: str) -> dict[str, str]:
    """What the ENV instructions of a stage set."""
    return dict(
        assignment.split("=", 1)
        for line in instructions(stage, "ENV")
        for assignment in shlex.split(line)
    )


def test_the_images_set_variables_that_the_settings_read() -> None:
    for stage in ("base", "api", "worker"):
        assert unknown_variables(variables(stage)) == []


def test_compiled_code_and_models_are_looked_for_where_volumes_are_mounted() -> None:
    found = variables("worker")
    folders = {found["DDPM_MODELS"], found["DDPM_CACHE_DIR"]}
    for name in ("worker", "worker-gpu"):
        mounted = {volume.split(":")[1] for volume in compose()["services"][name]["volumes"]}
        assert mounted == folders
    assert any(
        f"install --directory --owner=ddpm {found['DDPM_CACHE_DIR']}" in run
        for run in instructions("worker", "RUN")
    )


def test_compose_sets_variables_that_the_settings_read() -> None:
    known = {f"DDPM_{name.upper()}" for name in Settings.model_fields} | {"REDIS_URL"}
    services = compose()["services"]
    assert set(services) == {"redis", "api", "worker", "worker-gpu"}
    for name in ("api", "worker", "worker-gpu"):
        assert set(services[name]["environment"]) <= known
        assert services[name]["environment"]["REDIS_URL"].startswith("redis://redis:")
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_compose_publishes_on_the_loopback_address_alone() -> None:
    services = compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:${PORT:-8000}:8000"]}
    assert services["api"]["environment"]["DDPM_ALLOW_PUBLIC_WITHOUT_KEYS"] == "true"
    assert "8000" in instructions("api", "EXPOSE")


def test_compose_keeps_every_job_across_a_restart() -> None:
    redis = compose()["services"]["redis"]
    command = " ".join(redis["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "redis:/data" in redis["volumes"]
