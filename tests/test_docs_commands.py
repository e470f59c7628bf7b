"""Every command of the documentation: run as it stands, or marked with what it needs and parsed all the same."""

import contextlib
import fnmatch
import os
import re
import shutil
import subprocess
import sys

import pytest
from docs_blocks import COMMANDS, NEEDS, PYTHON, ROOT, SHELL, blocks, command_blocks, pages, prose
from docs_sandbox import BY, PREPARED, Sandbox

from harness_tasks.cli import NAMES
from medforget_dataset.hierarchy import LEVELS


BLOCKS = command_blocks()
RUNNABLE = sorted({block.page for block in BLOCKS if not block.needs and not block.file})


def _id(block):
    return block.name


def test_every_page_is_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/training.md", "docs/reproduce/README.md"} <= set(pages())
    assert len(BLOCKS) > 30


def test_only_what_a_test_cannot_have_is_excused():
    assert not [block.name for block in BLOCKS if block.needs and block.needs not in NEEDS]
    excused = [block.name for block in BLOCKS if block.needs in ("network", "hub")]
    assert len(excused) <= 10, excused


@pytest.mark.parametrize("page", pages())
def test_no_command_hides_where_no_test_looks(page):
    """In an indented block, or in a fenced one of no or another language; in those of `text` commands are parsed."""
    others = [block.text for block in blocks(page) if block.language not in (*SHELL, *PYTHON, "text")]
    names = "|".join(COMMANDS)
    assert not re.search(rf"^ {{4,}}(\$ )?({names}) ", prose(page), re.MULTILINE)
    assert not re.search(rf"^(\$ )?({names}) ", "\n".join(others), re.MULTILINE)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in SHELL], ids=_id)
def test_the_commands_of_a_block_are_right(block):
    assert "…" not in re.sub(r"#.*", "", block.text), "a command that cannot be copied"
    # A page may add a method or a kind of task, by a file, and then use it.
    added = "".join(f"{other.file}\n{other.text}" for other in blocks(block.page) if other.file)
    for words in block.commands():
        check_command(words, added)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in PYTHON], ids=_id)
def test_the_python_of_a_block_compiles(block):
    compile(block.text, block.name, "exec")


def test_examples_in_the_help_of_commands_are_right():
    found = [block for page in pages() for block in blocks(page) if block.language == "text"]
    lines = [line.split("   ")[0].strip() for block in found for line in block.text.splitlines()]
    examples = [line for line in lines if line.startswith("medforget ")]
    assert len(examples) > 3
    for example in examples:
        check_command(example.split())


def check_command(words, added=""):
    program, *rest = words
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
        assert set(rest) <= set(targets), words
    elif program in ("accelerate", "torchrun"):
        check_medforget(rest[rest.index("unlearn.cli") + 1 :], added)
    elif program == "medforget":
        check_medforget(rest, added)
    elif program == "lm_eval":
        check_lm_eval(rest, added)
    elif words[:2] == ["python", "-m"]:
        ours = (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        assert ours or words[2] in ("build", "pytest", "twine", "venv"), words
    elif program == "python" and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words
    elif program == "pip":
        for extra in re.findall(r"(?:medforget|\.)\[([\w,]+)\]", " ".join(rest)):
            declared = (ROOT / "setup.cfg").read_text()
            assert all(f"\n{name} =\n" in declared for name in extra.split(",")), words
    else:
        assert program in ("source", "export", "for", "done", "sed", "wget", "hf", "runs/empty/bin/pip"), words


def check_medforget(words, added=""):
    """Parse a call with the parser it is run with, and look up the names that are checked only when it runs."""
    from unlearn.cli import _parser
    from unlearn.methods import METHODS
    from unlearn.presets import FINETUNE_PRESETS, MODEL_PRESETS, TINY_PRESETS

    if words[:1] == ["eval"]:
        return check_lm_eval(words[1:], added)
    if words == ["--help"]:
        return None
    if words[1:] == ["--help"]:
        return _parser(words[0])
    args, unknown = _parser(words[0]).parse_known_args(words)
    assert not unknown, unknown
    if getattr(args, "model_preset", None):
        assert args.model_preset in MODEL_PRESETS
    if words[0] == "unlearn":
        is_added = f'name = "{args.method}"' in added
        assert args.level in LEVELS and (args.method in METHODS or is_added)
        assert is_added or args.preset is None or args.preset in METHODS[args.method].presets
    elif words[0] in ("finetune", "pretrain"):
        assert args.preset is None or args.preset in (FINETUNE_PRESETS if words[0] == "finetune" else TINY_PRESETS)
    if config := getattr(args, "accelerate_config", None):
        assert (ROOT / "unlearn" / "accelerate_configs" / f"{config}.yaml").is_file() or config.endswith(".yaml")
    return None


def check_lm_eval(words, added=""):
    from lm_eval._cli.harness import HarnessCLI

    words = words if words[:1] in (["run"], ["ls"], ["validate"]) or words == ["--help"] else ["run", *words]
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        tasks = HarnessCLI()._parser.parse_args(words)
        for pattern in getattr(tasks, "tasks", None) or []:
            if isinstance(pattern, str) and pattern.startswith("medforget"):
                kinds = re.findall(r"^harness_tasks/(_\w+)_yaml$", added, re.MULTILINE)
                assert fnmatch.filter(NAMES, pattern) or pattern.endswith(tuple(kinds)), pattern


def test_a_wrong_flag_in_a_block_is_found():
    for wrong in ("unlearn --method npo --level patient --model m --out o --colour red", "push dataset medforget"):
        with pytest.raises((AssertionError, SystemExit)):
            check_medforget(wrong.split())
    with pytest.raises((AssertionError, SystemExit)):
        check_lm_eval(["--tasks", "medforget_ward"])


def test_what_other_tests_cover_is_there():
    for name, test in BY.items():
        file, _, function = test.partition("::")
        assert (ROOT / file).is_file(), name
        assert f"def {function}(" in (ROOT / file).read_text() if function else True, test
        assert any(" ".join(words).startswith(name) for b in BLOCKS if b.language in SHELL for words in b.commands())


def test_pages_with_something_prepared_need_it():
    assert set(PREPARED) <= set(RUNNABLE)


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.mark.slow
def test_the_reference_of_every_command_is_current():
    subprocess.run([sys.executable, "docs/commands.py", "--check"], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_pictures_are_drawn(data_dir, tmp_path):
    shutil.copy(ROOT / "docs" / "figures.py", tmp_path)
    command = [sys.executable, "figures.py", data_dir, ROOT / "docs" / "reproduce"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    subprocess.run([str(part) for part in command], cwd=tmp_path, env=environment, check=True)
    names = {"pipeline.png", "radiographs.png", "demo-scores.png", "demo-forget-retain.png"}
    assert {picture.name for picture in tmp_path.glob("*.png")} == names
    assert all((ROOT / "docs" / name).is_file() for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_the_blocks_of_a_page_run(page, data_dir, tiny_checkpoint, tmp_path):
    with Sandbox(tmp_path, data_dir, tiny_checkpoint, PREPARED.get(page, ())) as sandbox:
        for block in blocks(page):
            if block.file:
                sandbox.write(block.file, block.text)
            elif block.language in SHELL + PYTHON and not block.needs:
                sandbox.run(block)
