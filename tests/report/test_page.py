"""The report in a real headless Chromium: charts drawn, nothing said on the console, nothing asked of a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit.api.report import write_report
from lowbit.core.errors import RecipeError
from tests.report.runs import write_artifact

pytest.importorskip("plotly")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    artifacts = [
        write_artifact(folder / "gptq", "gptq", 110, 0.03, 0.44, 11.0),
        write_artifact(folder / "rtn", "rtn", 108, 0.3, 0.30, 12.0, "significant loss"),
    ]
    for lang in ("en", "zh"):
        write_report(artifacts, folder / f"{lang}.html", lang=lang)
    (folder / "gptq/lowbit-eval.json").unlink()
    write_report([folder / "gptq"], folder / "bare.html")
    return {name: folder / f"{name}.html" for name in ("en", "zh", "bare")}


def test_holds_all_it_needs(pages: dict[str, Path]) -> None:
    text = pages["en"].read_text()
    own = re.sub(
        r"<script>.*?</script>", "", text, flags=re.DOTALL
    )  # plotly's own code names addresses it does not ask
    assert "http://" not in own
    assert "https://" not in own
    assert not re.search(r"<(script|link|img|iframe)[^>]+src=", own)


def test_words_of_the_model_are_text(pages: dict[str, Path]) -> None:
    text = pages["en"].read_text()
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "⏎" in text


def test_languages(pages: dict[str, Path]) -> None:
    assert '<html lang="zh-CN">' in pages["zh"].read_text()
    assert "显著损失" in pages["zh"].read_text()
    assert "significant loss" in pages["en"].read_text()
    with pytest.raises(RecipeError, match="no language"):
        write_report([], pages["en"], lang="fr")


def test_readable_without_sight(pages: dict[str, Path]) -> None:
    text = pages["en"].read_text()
    assert text.count('role="img" aria-label="') == text.count('class="chart')
    assert '<th scope="row">' in text
    assert 'class="skip" href="#table"' in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("name", "charts", "size"), [("en", 4, "1280,900"), ("zh", 4, "390,844"), ("bare", 1, "390,844")]
)
def test_draws_in_chromium(name: str, charts: int, size: str, pages: dict[str, Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
               "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom",
               f"--window-size={size}", pages[name].as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-ready="yes"' in done.stdout
    drawn = re.findall(r'<div class="chart[^"]*" id="(\w+)"[^>]*>(?=<div)', done.stdout.replace(" js-plotly-plot", ""))
    assert len(drawn) == charts, drawn
    assert done.stdout.count('class="plot-container') == charts
