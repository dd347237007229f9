"""Requests made from the server's own OpenAPI description, well-formed and not, to a real process."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from .serving.test_server import Server  # noqa: E402

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--draws", "2", "--attacks")
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_interface_is_what_its_description_says(server: Server, mode: GenerationMode) -> None:
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = []
    for found in api.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # which take nothing that could be wrong

        @settings(max_examples=75, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
        tried.append(operation.path)
    assert {"/v1/predict", "/v1/predict/files", "/v1/attack"} <= set(tried), tried
