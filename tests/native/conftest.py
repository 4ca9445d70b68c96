"""Without the library nothing here can run; an instruction set that this machine lacks is named, never passed over."""

import pytest

from fxquant.ops import library
from tests.native import cases


def pytest_report_header():
    lacking = [f"{name} ({why})" for name, why in cases.ISAS.items() if why]
    return f"{library.kernel_info()}; not on this machine: {', '.join(lacking) or 'none'}"


def pytest_collection_modifyitems(items):
    if not library.available():
        skip = pytest.mark.skip(reason=library.kernel_info().why)
        for item in items:
            if "tests/native" in item.path.as_posix() and "without_library" not in item.name:
                item.add_marker(skip)


@pytest.fixture(params=list(cases.ISAS) or ["none"])
def isa(request):
    """Each instruction set in turn; one that cannot be used here is skipped with its reason."""
    if cases.ISAS.get(request.param):
        pytest.skip(f"{request.param}: {cases.ISAS[request.param]}")
    return request.param
