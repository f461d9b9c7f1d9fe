"""README must stay true: its files exist, its file map is complete, its commands and Python parse."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualrefnet.cli import app, data, deployment, reports, runs  # noqa: F401 (the modules register the commands)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("dualrefnet ")]
)
def test_commands_of_the_readme_exist_with_their_options(line: str) -> None:
    words = shlex.split(line, comments=True)
    result = CliRunner().invoke(app, [words[1], "--help"])
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for word in words[2:]:
        if word.startswith("--"):
            assert word in plain, word


def test_python_of_the_readme_compiles() -> None:
    assert blocks("python")
    for block in blocks("python"):
        compile(block, "README.md", "exec")
