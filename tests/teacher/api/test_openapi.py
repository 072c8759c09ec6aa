"""Requests that schemathesis makes up from the API's own description."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.serving import small_teacher

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with small_teacher(tmp_path_factory.mktemp("openapi")) as teacher:
        teacher.account, teacher.key = teacher.store.add_account("Fuzzer", "open-bulk")
        yield teacher


@pytest.fixture
def description(served):
    return schemathesis.openapi.from_url(f"{served.home}openapi.json")


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered_as_described(case, served):
    case.call_and_validate(
        checks=CHECKS, headers={"authorization": f"Bearer {served.key}"}, timeout=60
    )
    running = served.store.database.execute(
        "SELECT COUNT(*) FROM usage WHERE status = 'running'"
    ).fetchone()[0]
    assert running == 0
