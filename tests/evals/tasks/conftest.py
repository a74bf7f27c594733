from __future__ import annotations

from pathlib import Path

import pytest

from tests.task_data import write_task_data


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("data"))
