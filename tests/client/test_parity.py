"""The client knows what the service knows: kinds, fields, codes, events, views."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Required, get_origin, get_type_hints

import pytest

import ddpm_client
from app import problems, views
from app.intake import body_model
from app.routes import models as model_routes
from app.routes import system
from ddpm_client import errors, events, kinds, models
from ddpm_client.asynchronous import AsyncClient
from ddpm_client.client import Client
from ddpm_client.jobs import AsyncJob, Job
from jobs.kinds.chain import Snapshots
from jobs.kinds.common import SpecWarning
from jobs.kinds.table import KINDS
from jobs.states import ENDED
from jobs.store.events import EVENTS
from jobs.version import VERSION
from tests.house import ROOT

FOLDER = ROOT / "client"


def test_every_kind_of_the_service_is_in_the_client() -> None:
    assert list(kinds.KINDS) == list(KINDS)
    for name in KINDS:
        assert {name, "create"} <= {n for n, _ in inspect.getmembers(Client, inspect.isfunction)}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_takes_the_fields_of_the_service(name: str) -> None:
    ours = kinds.KINDS[name]
    options = set(get_type_hints(kinds.Options))
    fields = set(get_type_hints(ours)) - options
    assert fields == set(body_model(KINDS[name]).model_fields) - {"kind"}
    required = {n for n, field in KINDS[name].model_fields.items() if field.is_required()}
    hints = get_type_hints(ours, include_extras=True)
    assert {n for n, hint in hints.items() if get_origin(hint) is Required} == required


def test_snapshots_too() -> None:
    assert set(get_type_hints(kinds.Snapshots)) == set(Snapshots.model_fields)


@pytest.mark.parametrize("code", problems.CODES)
def test_every_code_has_a_class_of_its_own_meaning(code: str) -> None:
    status = problems.CODES[code]
    assert code in errors.CODES or status in (409, 503) or code == "job_failed"
    found = errors.class_of(code, status)
    assert issubclass(found, errors.Unavailable) == (status in (408, 503, 504))
    assert set(errors.CODES) <= set(problems.CODES)


def test_a_code_that_is_new_goes_by_its_status() -> None:
    assert errors.class_of("brand_new", 429) is errors.QuotaExceeded
    assert errors.class_of("brand_new", 418) is errors.BadRequest
    assert errors.class_of("brand_new", 599) is errors.ServerFault


@pytest.mark.parametrize("name", EVENTS)
def test_events_have_the_same_fields(name: str) -> None:
    assert list(events.EVENTS) == list(EVENTS)
    assert set(events.EVENTS[name].model_fields) - {"id", "name"} == set(EVENTS[name].model_fields)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (models.JobData, views.JobView),
        (models.JobPage, views.JobList),
        (models.ImageData, views.ImageView),
        (models.SnapshotData, views.SnapshotView),
        (models.Urls, views.Urls),
        (models.FieldError, problems.FieldError),
        (models.FieldError, SpecWarning),
        (models.Preset, model_routes.PresetView),
        (models.ModelInfo, model_routes.ModelView),
        (models.Schedule, model_routes.ScheduleView),
        (models.QueueInfo, system.QueueView),
        (models.WorkerInfo, system.WorkerView),
        (models.Queues, system.QueuesView),
        (models.Readiness, system.Readiness),
    ],
)
def test_views_have_the_same_fields(ours: Any, theirs: Any) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields)
    for name, field in theirs.model_fields.items():
        if not field.is_required():
            assert not ours.model_fields[name].is_required(), name


def test_states_are_the_same() -> None:
    assert {*models.ENDED} == {str(status) for status in ENDED}


@pytest.mark.parametrize(("plain", "twin"), [(Client, AsyncClient), (Job, AsyncJob)])
def test_the_twins_can_do_the_same(plain: type, twin: type) -> None:
    def abilities(of: type) -> dict[str, Any]:
        return {name: its for name, its in inspect.getmembers(of) if not name.startswith("_")}

    assert set(abilities(plain)) == set(abilities(twin))
    for name, its in abilities(plain).items():
        if inspect.isfunction(its):
            parameters = list(inspect.signature(its).parameters.values())
            others = list(inspect.signature(abilities(twin)[name]).parameters.values())
            assert [(p.name, p.kind, p.default) for p in parameters] == [
                (p.name, p.kind, p.default) for p in others
            ], name
            assert its.__doc__, name


def test_it_is_a_distribution_of_its_own() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {line.partition(">")[0] for line in project["dependencies"]}
    optional = {
        line.partition(">")[0] for e in project["optional-dependencies"].values() for line in e
    }
    assert (declared, optional) == ({"httpx", "pydantic"}, {"pillow", "numpy"})
    for path in (FOLDER / "ddpm_client").glob("*.py"):
        assert imported(path) <= {"ddpm_client", *declared, *sys.stdlib_module_names}, path.name
    assert ddpm_client.__version__ == VERSION


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports when it runs, not for types alone."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_it_does_without_pil_and_numpy_until_they_are_needed() -> None:
    code = """
import sys
sys.modules["PIL"] = sys.modules["numpy"] = None
import ddpm_client
from ddpm_client.pictures import to_array, to_pil
for call, package in ((to_pil, "PIL"), (to_array, "numpy")):
    try:
        call(b"")
    except ddpm_client.MissingPackage as error:
        assert f"needs {package}, which is not installed: pip install 'ddpm-client[" in str(error)
    else:
        raise AssertionError(package)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=FOLDER)
