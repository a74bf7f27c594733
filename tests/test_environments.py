"""Side environments, with tiny wheels made here: no network, real venv and real pip."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lowbit import environments
from lowbit.core.errors import SideEnvironmentError
from lowbit.environments import EnvironmentSpec, Progress, Shim, Step, known, parse_spec
from lowbit.locks.state import STATE_FILE

IMPORT_BOTH = "import tiny_first, tiny_second; import importlib.metadata as m; assert m.version('elsewhere') == '9.8'"


def make_wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


@pytest.fixture(scope="module")
def lock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a lock with two steps of one local wheel each."""
    wheels = tmp_path_factory.mktemp("wheels")
    first, second = make_wheel(wheels, "tiny_first"), make_wheel(wheels, "tiny_second")
    return f"""
description = "for tests"
python_min = "3.11"
python_below = "4.0"
size_mib = 1
minutes = 0.1
check = ["-c", {json.dumps(IMPORT_BOTH)}]
[[steps]]
name = "first"
requirements = [{json.dumps(str(first))}]
[[steps]]
name = "second"
requirements = [{json.dumps(str(second))}]
dependencies = true
[[shims]]
name = "elsewhere"
version = "9.8"
"""


@pytest.fixture(scope="module")
def spec(lock: str) -> EnvironmentSpec:
    return parse_spec("tiny", lock)


@pytest.fixture(scope="module")
def built(spec: EnvironmentSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a ready environment `tiny`; tests must not change it."""
    root = tmp_path_factory.mktemp("built")
    environments.add(spec, root=root)
    return root


def titles(reports: list[Progress]) -> list[str]:
    """The distinct titles in their order."""
    return list(dict.fromkeys(report.title for report in reports))


def add_in_child(lock: str, folder: Path, root: Path, on_progress: str) -> subprocess.Popen[str]:
    """Another process that adds the environment; `on_progress` is the body of its callback, `p` the Progress."""
    (folder / "tiny.toml").write_text(lock)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lowbit.environments import add, parse_spec\n"
        f"def progress(p):\n    {on_progress}\n"
        "add(parse_spec('tiny', Path(sys.argv[1]).read_text()), root=Path(sys.argv[2]), progress=progress)\n"
    )
    command = [sys.executable, "-c", program, str(folder / "tiny.toml"), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_ready_environment_answers_and_is_left_alone(spec: EnvironmentSpec, built: Path) -> None:
    reports: list[Progress] = []
    python = environments.add(spec, root=built, progress=reports.append)
    assert reports == []
    assert python == environments.python_of(spec, root=built) == built / "tiny" / "bin" / "python"
    program = (
        "import json, os, sys, tiny_second; print('noise')\n"
        "print(json.dumps([tiny_second.version, sys.argv[1:], os.environ['A']]))"
    )
    answer = environments.run_json(spec, ["-c", program, "x y"], root=built, variables={"A": "b"})
    assert answer == ["1.0", ["x y"], "b"]


def test_pythonpath_of_the_caller_does_not_reach_the_environment(
    spec: EnvironmentSpec, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    program = "import json, sys; print(json.dumps('/somewhere/else' in sys.path))"
    assert environments.run_json(spec, ["-c", program], root=built) is False


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise ValueError('the cause')", "exit code 1.*ValueError: the cause"),
        ("print('no json')", "printed no JSON.*no json"),
        ("pass", "printed no JSON"),
    ],
)
def test_a_failing_program_is_quoted(program: str, expected: str, spec: EnvironmentSpec, built: Path) -> None:
    with pytest.raises(SideEnvironmentError, match=f"(?s){expected}"):
        environments.run_json(spec, ["-c", program], root=built)


def test_a_program_out_of_time_is_stopped(spec: EnvironmentSpec, built: Path) -> None:
    with pytest.raises(SideEnvironmentError, match=r"did not finish in 0\.2 seconds"):
        environments.run_json(spec, ["-c", "import time; time.sleep(60)"], root=built, timeout=0.2)


def test_killed_it_continues_where_it_was(lock: str, spec: EnvironmentSpec, tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    for moment in ("p.title == 'first' and p.line", "p.title == 'second'"):  # while pip runs; between two steps
        child = add_in_child(lock, tmp_path, tmp_path, f"{moment} and {kill}")
        assert child.wait() == -9
        with pytest.raises(SideEnvironmentError, match="is not finished") as caught:
            environments.python_of(spec, root=tmp_path)
        assert caught.value.hint == "lowbit env add tiny"

    # A package that broke off while it was unpacked: pip would take its metadata for an installed package.
    info = next((tmp_path / "tiny").glob("lib/python*/site-packages")) / "tiny_second-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny_second\nVersion: 1.0\n")

    reports: list[Progress] = []
    environments.add(spec, root=tmp_path, progress=reports.append)
    assert titles(reports) == ["second", "check"]
    assert reports[0] == Progress(3, 4, "second")
    environments.python_of(spec, root=tmp_path)


def test_two_at_once_build_it_once(lock: str, tmp_path: Path) -> None:
    children = [add_in_child(lock, tmp_path, tmp_path, "print(p.title, flush=True)") for _ in range(2)]
    seen = sorted((list(dict.fromkeys(child.communicate()[0].split())) for child in children), key=len)
    assert [child.returncode for child in children] == [0, 0]
    assert seen == [["wait"], ["create", "first", "second", "check"]]


def test_a_failed_check_a_changed_lock_and_no_network(
    spec: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dataclasses.replace(spec, check=("-c", "raise SystemExit('the check says no')"), steps=spec.steps[:1])
    for expected in (["create", "first", "check"], ["check"]):
        reports: list[Progress] = []
        with pytest.raises(SideEnvironmentError, match=r"(?s)its check failed.*the check says no"):
            environments.add(bad, root=tmp_path, progress=reports.append)
        assert titles(reports) == expected
    with pytest.raises(SideEnvironmentError, match="is not finished"):
        environments.python_of(bad, root=tmp_path)

    with pytest.raises(SideEnvironmentError, match="another version of lowbit"):
        environments.python_of(spec, root=tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    offline = dataclasses.replace(spec, steps=(spec.steps[0], Step("second", ("no-such-package-of-lowbit==1.0",))))
    reports = []
    with pytest.raises(SideEnvironmentError, match=r"(?s)Step 'second' .*index could not be reached") as caught:
        environments.add(offline, root=tmp_path, progress=reports.append)
    assert titles(reports) == ["create", "first", "second"], "another lock is built from the beginning"
    assert "no-such-package-of-lowbit" in caught.value.message
    assert "continues where it stopped" in str(caught.value.hint)
    assert json.loads((tmp_path / "tiny" / STATE_FILE).read_text())["completed"] == ["create", "first"]
    assert not list(tmp_path.glob(".*deleted"))


def test_too_little_space_is_said_before_anything_is_made(spec: EnvironmentSpec, tmp_path: Path) -> None:
    with pytest.raises(SideEnvironmentError, match=r"needs about 1,000,000,000,000 MiB .* nothing was installed"):
        environments.add(dataclasses.replace(spec, size_mib=10**12), root=tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_another_python_is_refused(spec: EnvironmentSpec, tmp_path: Path) -> None:
    with pytest.raises(SideEnvironmentError, match=r"needs Python 3\.2 or later, before 3\.4"):
        environments.add(dataclasses.replace(spec, python_min="3.2", python_below="3.4"), root=tmp_path)


def test_a_directory_of_somebody_else_is_not_touched(spec: EnvironmentSpec, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "diary.txt").write_text("mine")
    for change in (lambda: environments.add(spec, root=tmp_path), lambda: environments.remove("tiny", root=tmp_path)):
        with pytest.raises(SideEnvironmentError, match="was not made by lowbit"):
            change()
    assert (tmp_path / "tiny" / "diary.txt").read_text() == "mine"


def test_an_unwritable_root_is_said(spec: EnvironmentSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SideEnvironmentError, match="cannot be written"):
        environments.add(spec, root=tmp_path / "file")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b"])
def test_a_name_cannot_leave_the_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(SideEnvironmentError, match="is not the name"):
        environments.remove(name, root=tmp_path)


def test_unknown_name_has_a_suggestion() -> None:
    with pytest.raises(SideEnvironmentError, match=r"'vllm-cup' \(did you mean 'vllm-cpu'\?\)"):
        environments.python_of("vllm-cup")


def test_missing_environment_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SideEnvironmentError, match="is not installed") as caught:
        environments.run_json("gguf-convert", ["-c", "1"], root=tmp_path)
    assert caught.value.hint == "lowbit env add gguf-convert"


def test_the_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.default_root() == tmp_path / "lowbit" / "envs"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert environments.default_root() == tmp_path / ".cache" / "lowbit" / "envs"


def test_carried_locks_pin_every_package() -> None:
    specs = known()
    assert {"vllm-cpu", "gguf-convert", "llm-compressor", "auto-round"} <= set(specs)
    for spec in specs.values():
        names = [requirement.split("==")[0].lower() for requirement in spec.pins]
        assert len(names) == len(set(names)), f"{spec.name} pins a package twice"
        for step in spec.steps:
            assert all(requirement.count("==") == 1 for requirement in step.requirements)
            assert step.dependencies == step.torch, "only torch differs between indexes, so only it may add packages"


def test_fingerprint_follows_what_is_installed_and_nothing_else(spec: EnvironmentSpec) -> None:
    same = dataclasses.replace(spec, description="other words", size_mib=7, minutes=9)
    assert same.fingerprint == spec.fingerprint
    changes = {"steps": spec.steps[:1], "check": ("-c", ""), "shims": (Shim("elsewhere", "9.9"),), "python_min": "3.12"}
    assert all(dataclasses.replace(spec, **{k: v}).fingerprint != spec.fingerprint for k, v in changes.items())


def test_an_environment_that_an_image_brings_is_found(
    spec: EnvironmentSpec, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # an empty volume
    monkeypatch.setattr(environments, "known", lambda: {"tiny": spec})
    with pytest.raises(SideEnvironmentError, match="is not installed"):
        environments.python_of(spec)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    environments.shared_root().parent.mkdir(parents=True)
    environments.shared_root().symlink_to(built)
    assert environments.python_of(spec) == environments.shared_root() / "tiny" / "bin" / "python"
    row = environments.list_environments()[0]
    assert (row.name, row.state, row.path) == ("tiny", "ready", environments.shared_root() / "tiny")
    assert not environments.remove("tiny")  # what the image brings is not the user's to delete
    assert not (tmp_path / "cache").exists()
