"""A child never outlives lowbit, is noticed when it ends, and is let finish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lowbit.runtimes.child import Child
from lowbit.runtimes.diagnose import diagnose, quote


def script(folder: Path, body: str) -> list[str]:
    file = folder / "runtime.py"
    file.write_text(textwrap.dedent(body))
    return [sys.executable, str(file)]


def until(done: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return done()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_lines_and_exit_code(tmp_path: Path) -> None:
    heard: list[str] = []
    child = Child(script(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"), os.environ,
                  heard.append)  # fmt: skip
    assert child.wait(20) == 7
    assert sorted(heard) == ["err", "out"]
    assert sorted(child.tail) == ["err", "out"]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    child = Child([str(tmp_path / "nothing")], os.environ, lambda line: None)
    assert child.wait(20) == 1
    assert "cannot be started" in child.tail[-1]


def test_stop_lets_it_finish(tmp_path: Path) -> None:
    child = Child(script(tmp_path, """
        import signal, sys, time
        def finish(*_):
            time.sleep(0.3); print("finished", flush=True); sys.exit(0)
        signal.signal(signal.SIGTERM, finish)
        print("up", flush=True)
        time.sleep(60)
    """), os.environ, lambda line: None)  # fmt: skip
    assert until(lambda: "up" in child.tail)
    assert child.stop(20) == 0
    assert child.tail[-1] == "finished"


def test_stop_kills_what_does_not_listen_and_all_it_started(tmp_path: Path) -> None:
    child = Child(script(tmp_path, """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(os.getpid(), helper.pid, flush=True)
        time.sleep(60)
    """), os.environ, lambda line: None)  # fmt: skip
    assert until(lambda: bool(child.tail))
    pids = [int(word) for word in child.tail[0].split()]
    child.stop(0.2)
    assert until(lambda: all(gone(pid) for pid in pids))


def test_kill_of_the_runtime_is_noticed(tmp_path: Path) -> None:
    child = Child(script(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)"), os.environ,
                  lambda line: None)  # fmt: skip
    assert until(lambda: bool(child.tail))
    os.kill(int(child.tail[0]), signal.SIGKILL)
    assert child.wait(2) == 128 + signal.SIGKILL
    child.stop(1)


@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_kill_of_the_parent_or_the_guard_leaves_nobody(tmp_path: Path, victim: str) -> None:
    runtime = script(tmp_path, "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)")
    parent_code = f"""
        import os, time
        from lowbit.runtimes.child import Child
        child = Child({runtime!r}, os.environ, lambda line: print(line, flush=True))
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent_code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    runtime_pid, guard_pid = (int(word) for word in parent.stdout.readline().split())
    os.kill(parent.pid if victim == "parent" else guard_pid, signal.SIGKILL)
    assert until(lambda: gone(runtime_pid) and gone(guard_pid))
    parent.kill()
    parent.wait()


@pytest.mark.parametrize(
    ("line", "code", "cause", "hint"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", 1, "not enough memory", "--context"),
        ("[Errno 98] error while attempting to bind on address: address already in use", 1, "port is taken", "--port"),
        (
            "ValueError: Failed to find a kernel that can implement the ScaledMM linear layer",
            1,
            "no kernel",
            "--runtime",
        ),
        ("RuntimeError: Triton dequant kernels require CUDA tensors", 1, "no kernel", "--runtime"),
        ("what():  tinygemm_kernel_nn: scalar path not implemented!", 1, "this dtype (what():", "--dtype bfloat16"),
        ("error loading model: unknown model architecture: 'foo'", 1, "model family", "newer release"),
        ("Worker proc VllmWorker-0 died unexpectedly (exit code: None)", 0, "one of its processes died", ""),
        ("loading", 137, "killed", "--context"),
        ("loading", 132, "instructions", "this CPU"),
    ],
)
def test_known_causes(line: str, code: int, cause: str, hint: str) -> None:
    found, mend = diagnose(["starting", line], code)
    assert cause in found
    assert hint in (mend or "")


def test_clean_up_is_not_quoted() -> None:
    lines = ["the cause", "nanobind: leaked 4 instances!", ' - leaked function "get_body"', "", "bye"]
    assert quote(lines) == "\n    the cause\n    bye"


def test_an_unknown_cause_is_not_guessed() -> None:
    assert diagnose(["something else"], 1) == ("its last lines may say why", None)
