"""Every Python example of the README and the guides runs, in order, on handwritten digits.

Commands are those of the program, with options that it has; files and requests are of their form.
"""

import functools
import inspect
import re
import shlex
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import selfensemble as rse
import selfensemble.__main__
from selfensemble.cli.base import app
from selfensemble.evaluation.protocol import load_protocol
from selfensemble.experiments import EXPERIMENTS
from selfensemble.report import card
from selfensemble.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / page).read_text()) if kind in (kinds or ("python",))]


def commands(page: str) -> list[list[str]]:
    """Arguments of every `selfensemble` of a page, in blocks of the shell and within lines."""
    text = (ROOT / page).read_text()
    lines = [
        re.sub(r"^.*-m (-- )?(?=selfensemble )", "", line.strip())
        for block in blocks(page, "console", "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    within = re.findall(r"(?<!`)`(selfensemble [^`]+)`(?!`)", text)
    return [
        shlex.split(line, comments=True)[1:]
        for line in (*lines, *(each.replace("\n", " ") for each in within))
        if line.startswith("selfensemble ") and "..." not in line
    ]


COMMANDS = sorted({(page, *arguments) for page in PAGES for arguments in commands(page)})


_program: Any = functools.cache(lambda: typer.main.get_command(app))


def parse(arguments: Sequence[str]) -> None:
    """An error unless the program has such a command with such options; nothing is run."""
    program = command = _program()
    if arguments[0] != "--help":
        command, arguments = program.commands[arguments[0]], arguments[1:]
    context = command.context_class(command)
    command.make_parser(context).parse_args(list(arguments))


@pytest.mark.parametrize("shown", COMMANDS, ids=" ".join)
def test_commands_have_the_options_that_are_shown(shown: tuple[str, ...]) -> None:
    parse(shown[1:])


def test_a_command_that_is_not_there_would_be_found() -> None:
    assert len(COMMANDS) > 30
    with pytest.raises(Exception, match="no-such-option"):
        parse(["evaluate", "MODEL", "--no-such-option"])
    with pytest.raises(KeyError):
        parse(["no-such-command"])


def test_files_that_are_shown_are_of_their_form(tmp_path: Path) -> None:
    (recipe,) = blocks("docs/cli.md", "yaml")
    (protocol,) = blocks("docs/evaluation.md", "yaml")
    for name, text in (("recipe", recipe), ("protocol", protocol)):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "recipe.yaml")).noise.draws == 10
    assert load_protocol(str(tmp_path / "protocol.yaml")).images == 1000
    schemas = pytest.importorskip("selfensemble.serving.schemas")
    (request,) = blocks("docs/serving.md", "json")
    assert schemas.Request.model_validate_json(request).top == 5


def test_the_readme_is_short_and_its_files_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 700
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_there_are_examples() -> None:
    assert sum(len(blocks(page)) for page in PAGES) > 5


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
@pytest.mark.usefixtures("fewer_checks")
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page leaves to its reader is given here: a network, images, labels, a folder.

    Trainings are a third as long as shown, and of 40 images 15 are attacked.
    """
    monkeypatch.chdir(tmp_path)
    data = rse.load_data("digits", "test")
    model = rse.create_model("small-cnn", channels=1, width=0.25)
    torch.manual_seed(0)
    own = rse.create_model("small-cnn", channels=1, width=0.25)
    names: dict[str, Any] = {
        "my_model": own,
        "my_optimizer": torch.optim.SGD(own.parameters(), lr=0.01),
        "my_batches": [(data.inputs(slice(8)), data.labels[:8])],
        "torch": torch,
        "model": model,
        "images": data.inputs(slice(8)),
        "labels": data.labels[:8],
        "ensemble": rse.SelfEnsemble(rse.create_model("small-cnn", channels=1, width=0.25)),
    }
    # Others may warn of their own affairs.
    foreign = any(
        re.search(r"^(import|from) (lightning|transformers)", each, re.MULTILINE) for each in blocks(page)
    )
    for block in blocks(page):
        if "foolbox" in block and find_spec("foolbox") is None:
            continue  # an extra of its own
        code = "\n".join(line for line in block.splitlines() if not re.match(r"\w+ = \.\.\.", line))
        code = re.sub(r"\bepochs=(\d+)", lambda found: f"epochs={max(1, int(found[1]) // 3)}", code)
        code = code.replace('"images": 40', '"images": 15')
        with warnings.catch_warnings():
            warnings.simplefilter("default" if foreign else "error")
            exec(compile(code, page, "exec"), names)


def test_what_there_is_stands_in_the_lists() -> None:
    """Public names in the interface's page, experiments in the help, commands in the list of changes."""
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"::: (\S+)", page))
    for name in rse.__all__:
        found = getattr(rse, name)
        module = found.__name__ if inspect.ismodule(found) else found.__module__
        assert any(module == each or each.startswith(f"{module}.") for each in shown), name
    program = _program()
    (help_,) = [each.help for each in program.commands["reproduce"].params if each.name == "names"]
    assert set(re.findall(r"[a-z0-9-]+", help_)) - {"or", "all"} == set(EXPERIMENTS)
    assert tuple(EXPERIMENTS) == card.EXPERIMENTS  # by which cards tell what made a figure
    changes = (ROOT / "CHANGELOG.md").read_text()
    for name in program.commands:
        assert re.search(rf"[|`] ?(selfensemble )?{name}\b", changes), name
