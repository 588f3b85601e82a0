import os

import pytest

from quick import is_quick, nothing_starts

# Spin barriers of several threads on shared cores make a test a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only tests that start no engine and no server")


@pytest.fixture(scope="session")
def only_quick():
    with nothing_starts():
        yield


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    quick = {item: is_quick(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not quick[item]])
    items[:] = [item for item in items if quick[item]]
    for item in items:
        item.fixturenames.insert(0, "only_quick")
