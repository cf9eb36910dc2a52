"""The README and docs/: every shell command is checked, and every link and name in the text exists.

Commands are checked in this process, which takes seconds: the overrides of a run are composed, the options of a module
are parsed by its own parser, and make targets are looked up. Nothing is started. Model folders and documents that a
command names, such as /models/mine, are replaced by complete but empty ones. A program that nobody checks is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import recipes
from launch.help_config import to_markdown, to_text
from launch.planning.automatic import compose
from launch.planning.output import to_table
from launch.planning.plan import make_plan
from launch.run import read_arguments
from prune_distill.config import values
from prune_distill.config.composition import sweep
from prune_distill.config.input_files import HUB_FOLDERS
from prune_distill.pipeline.stages import STAGES, find, select_stages
from prune_distill.schema import RunConfig
from tests.conftest import QWEN3
from tests.helpers.hf_folders import complete

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
MOST_LINES_OF_README = 150

# Every block has a language, so that no command escapes the checks. Commands are in `bash` blocks only.
LANGUAGES = ("bash", "text", "yaml")
NOT_TESTED = re.compile(r"<!-- not tested:(.*)-->")

# Programs whose commands are not checked, each with the reason.
NOT_CHECKED = {
    "docker": "not installed where the tests run; `make lint` checks the Dockerfile",
    "sbatch": "submits a script that an earlier command wrote; tests/slurm submits real ones",
    "source": "reads a file that `make setup` wrote",
    "touch": "creates the file that it names",
}
# Operators of the shell, which are not checked. Write one command per line.
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}

# The sizes of Qwen3-8B, so that the published recipes accept the folder. Its weights are holes in a file.
QWEN3_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MODELS = ("models/mine", "models/larger", "models/coder", "models/Qwen3-8B", "shared/models/Qwen3-8B")
CHATS = "data/chats.jsonl"
DOCUMENTS = ("data/docs.jsonl", "data/code.jsonl", CHATS)
CLIMBMIX = ("data/climbmix", "shared/climbmix")
# Absolute paths in the documentation. They are replaced by paths below a temporary folder.
PLACES = re.compile(r"(?<![\w.~])/(?=(?:models|data|shared)/)")
ABSOLUTE = re.compile(r"(?<![\w.~:/*])/\w")
STAGE_FOLDER = re.compile(r"RUN_DIR/([\w.]+)-[0-9a-f]{8}\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: the number of its first line, the fence.
        not_tested: the reason in a comment before it; None where there is no such comment.
    """

    page: Path
    line: int
    language: str
    text: str
    not_tested: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        before = next((text for text in reversed(lines[:opened]) if text.strip()), "")
        comment = NOT_TESTED.fullmatch(before.strip())
        language = lines[opened].strip().removeprefix("```")
        text = "\n".join(lines[opened + 1 : number])
        yield Block(page, opened + 1, language, text, comment and comment[1].strip())
        opened = None
    assert opened is None, f"{page.name}:{(opened or 0) + 1}: the block has no end"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash" and block.not_tested is None]


def split_commands(text: str) -> list[list[str]]:
    """The commands of a block, each as its words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# How a command is checked.


class _Parsed(BaseException):
    """Stops a module after it has parsed its command line. Not an `Exception`, so that the module does not catch it."""

    def __init__(self, values: argparse.Namespace) -> None:
        super().__init__()
        self.values = values


@dataclass
class Checker:
    """Checks the commands of one block.

    Attributes:
        folder: holds the models and documents that commands name.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def check(self, words: list[str]) -> None:
        """Fail on a command that would not start."""
        assert not OPERATORS & set(words), "one command per line, without operators of the shell"
        for name in STAGE_FOLDER.findall(" ".join(words)):
            find(name)
        program, *rest = words
        if program in NOT_CHECKED:
            return
        assert program in CHECKS, (
            f"nobody checks {program!r}; add a check, add it to NOT_CHECKED with a reason, or mark the block "
            "with <!-- not tested: REASON -->"
        )
        CHECKS[program](self, [self.substitute(word) for word in rest])

    def substitute(self, word: str) -> str:
        """Replace the paths in a word by paths below the temporary folder."""
        word = PLACES.sub(f"{self.folder}/", word)
        unknown = ABSOLUTE.search(word.replace(f"{self.folder}/", ""))
        assert not unknown, f"{word!r} names a path that no test provides; use one of {', '.join(MODELS + DOCUMENTS)}"
        word = re.sub(r"\b(OTHER_)?RUN_DIR\b", f"{self.folder}/run", word)
        return str(self.folder / "DIR") if word == "DIR" else word

    def python(self, words: list[str]) -> None:
        assert words[:1] == ["-m"], "write python -m MODULE"
        module, arguments = words[1], words[2:]
        assert is_module(module), f"there is no module {module}"
        if module == "launch.run":
            self.launch(arguments)
        elif module == "launch.docker":
            self.launch(self.parse(module, arguments).run)
        elif module in ("launch.plan", "launch.doctor"):
            args = self.parse(module, arguments)
            if args.overrides:
                for_plan = module == "launch.plan"
                compose(args.overrides, not for_plan, args.config_dir, for_plan)
        else:
            package, _, name = module.partition(".")
            assert package != "recipes" or name in ("", *recipes.COMMANDS), f"python -m {module} is no command"
            args = self.parse(module, arguments)
            if module == "recipes":
                find(args.stage)

    def launch(self, arguments: list[str]) -> None:
        """Compose the runs of `launch.run`."""
        args = read_arguments(arguments)
        if args.help_config is not None:
            assert to_text(args.help_config)
            return
        jobs = sweep(args.overrides, args.config_dir) if args.multirun else [args.overrides]
        for job in jobs:
            cfg = compose(job, check_files=args.cfg is None, config_dir=args.config_dir)
            assert args.until in {None, *(stage.name for stage in select_stages(cfg))}

    def parse(self, module: str, arguments: list[str]) -> argparse.Namespace:
        """Parse a command line with the module's own parser: runs the module until it has parsed its arguments."""
        with self.monkeypatch.context() as patched:
            for name in ("parse_args", "parse_intermixed_args"):
                patched.setattr(argparse.ArgumentParser, name, _stop_after(getattr(argparse.ArgumentParser, name)))
            patched.setattr(argparse.ArgumentParser, "error", _refuse)
            patched.setattr(sys, "argv", [module, *arguments])
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except _Parsed as parsed:
                return parsed.values
        raise AssertionError(f"python -m {module} parses no command line")

    def torchrun(self, words: list[str]) -> None:
        option, ranks, *rest = words
        assert option == "--nproc_per_node"
        assert ranks.isdecimal()
        self.python(rest)

    def make(self, words: list[str]) -> None:
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        targets = [word for word in words if "=" not in word]
        assert targets, "name a target"
        rules = {target: find_recipe(target) for target in targets}
        for name, value in settings.items():
            assert f"$({name})" in MAKEFILE, f"the Makefile has no {name}"
            for rule in rules.values() if name == "ARGS" else ():
                assert "$(ARGS)" in rule, "the target takes no ARGS"
                self.parse(re.findall(r"-m (\S+) \$\(ARGS\)", rule)[0], shlex.split(value))

    def export(self, words: list[str]) -> None:
        (setting,) = words
        name, _, value = setting.partition("=")
        assert value, "write export NAME=VALUE"
        self.monkeypatch.setenv(name, value)


CHECKS: dict[str, Callable[[Checker, list[str]], None]] = {
    "export": Checker.export,
    "make": Checker.make,
    "python": Checker.python,
    "torchrun": Checker.torchrun,
}


def _stop_after(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    def parse_and_stop(parser: argparse.ArgumentParser, *arguments: object) -> argparse.Namespace:
        raise _Parsed(parse(parser, *arguments))

    return parse_and_stop


def _refuse(parser: argparse.ArgumentParser, message: str) -> typing.NoReturn:
    pytest.fail(f"{parser.prog}: {message}")


MAKEFILE = (ROOT / "Makefile").read_text()


def find_recipe(target: str) -> str:
    """The lines of a make target: the rule, and the commands below it."""
    found = re.search(rf"^{re.escape(target)}:(?!=).*\n(?:\t.*\n)*", MAKEFILE, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    return found[0]


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands name: models, documents, an image, and the group files that a page shows."""
    folder = tmp_path_factory.mktemp("docs")
    for name in MODELS:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(QWEN3 | QWEN3_8B))
        (folder / name / "chat_template.jinja").write_text("{{ messages }}")
        complete(folder / name)
    files = [*DOCUMENTS, *(f"{name}/part_{number}.jsonl" for name in CLIMBMIX for number in range(100))]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"messages": []}\n' if name == CHATS else '{"text": "A document."}\n')
    (folder / "shared" / "nemo-prune-distill.sqsh").touch()
    for block in BLOCKS:
        for name in re.findall(r"^# (DIR/\S+\.yaml)$", block.text, re.MULTILINE) if block.language == "yaml" else []:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(block.text)
    return folder


@pytest.fixture
def checker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checker:
    for name in (*HUB_FOLDERS, "CLIMBMIX_DIR"):
        monkeypatch.delenv(name, raising=False)
    # As after `make serve-env`.
    monkeypatch.setattr(values, "SERVE_PYTHON", Path(sys.executable))
    monkeypatch.chdir(folder)
    return Checker(folder, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("block", SHELL, ids=[block.place for block in SHELL])
def test_commands(block: Block, checker: Checker) -> None:
    commands = split_commands(block.text)
    assert commands, "the block holds no command"
    for words in commands:
        try:
            checker.check(words)
        except Exception as error:
            pytest.fail(f"{block.place}: {shlex.join(words)}\n{error}")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("curl https://example.com", "nobody checks 'curl'"),
        ("python train.py", "python -m MODULE"),
        ("python -m launch.nothing", "no module launch.nothing"),
        ("python -m launch.run experiment=demo distill.lrr=1", "distill.lrr: not a known key"),
        ("python -m launch.run experiment=demo --until prun", "assert"),
        ("python -m launch.run experiment=demo -m prune.num_layers=4,7", "prune.num_layers=7"),
        ("python -m launch.run --help-config distil", "did you mean distill"),
        ("python -m launch.plan experiment=dmo", "did you mean demo"),
        ("python -m launch.docker -- experiment=demo seed=x", "seed=x: "),
        ("python -m launch.status RUN_DIR --wacth", "--wacth"),
        ("python -m convert.hf_to_nemo --hf-model /models/mine", "--out"),
        ("python -m recipes.report", "RUN_DIR"),
        ("python -m recipes.prune --config RUN_DIR/resolved.yaml", "python -m recipes.prune is no command"),
        ("python -m recipes distil --config RUN_DIR/resolved.yaml", "no stage 'distil'"),
        ("python -m recipes prune", "--config"),
        ("python -m launch.status /srv/run", "names a path that no test provides"),
        ("touch RUN_DIR/distil-1a2b3c4d/stop", "no stage 'distil'"),
        ("make dem", "no target dem"),
        ("make demo EPOCHS=1", "has no EPOCHS"),
        ("make demo ARGS=--skip-quality", "takes no ARGS"),
        ("make bench-distill ARGS=--fast", "--fast"),
        ("make demo | tee log", "one command per line"),
    ],
)
def test_faulty_commands_are_detected(command: str, part: str, checker: Checker) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        checker.check(shlex.split(command))
    assert part in str(caught.value)


def test_the_list_of_unchecked_programs_is_short() -> None:
    """Each entry is needed, and has a reason."""
    used = {words[0] for block in SHELL for words in split_commands(block.text)}
    assert set(NOT_CHECKED) == used - set(CHECKS)
    assert all(NOT_CHECKED.values())


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_every_block_has_a_language(block: Block) -> None:
    assert block.language in LANGUAGES
    assert block.not_tested != "", "say why: <!-- not tested: REASON -->"


@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_a_page_starts_with_a_command(page: Path) -> None:
    first = next(read_blocks(page))
    assert first in SHELL
    assert first.line < 10


def test_the_readme_is_short_and_names_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES_OF_README
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in text] == []


def test_the_excerpt_of_a_plan() -> None:
    """Its numbers are those of the plan; words may change."""
    command, excerpt = list(read_blocks(ROOT / "docs" / "planning.md"))[:2]
    ((*_, experiment, cluster),) = split_commands(command.text)
    planned = {read_numbers(line) for line in to_table(make_plan(compose([experiment, cluster]))).splitlines()}
    assert [line for line in excerpt.text.splitlines() if read_numbers(line) not in planned] == []


def test_the_configuration_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == to_markdown(), (
        "docs/configuration.md is out of date; run make docs, or "
        "python -m launch.run --help-config --markdown > docs/configuration.md"
    )


def read_numbers(line: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d[\d.,e+]*", line))


# Links.


def read_prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_are_valid(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


def test_anchors() -> None:
    page = ROOT / "docs" / "getting-started.md"
    assert {"getting-started", "what-the-demo-does"} <= list_anchors(page)


# Names in the text.


def list_spans(page: Path) -> set[str]:
    """What a page sets as code in its text: keys, files, modules."""
    return set(re.findall(r"`([^`\n]+)`", read_prose(page)))


def is_key(name: str) -> bool:
    """Whether the configuration has a dotted key."""
    kinds: list[object] = [RunConfig]
    for part in name.split("."):
        classes = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
        hints = [typing.get_type_hints(kind)[part] for kind in classes if part in typing.get_type_hints(kind)]
        if not hints:
            return False
        kinds = [leaf for hint in hints for leaf in split_type(hint)]
    return True


def split_type(hint: object) -> list[object]:
    """The classes in a type such as `dict[str, DataSource] | None`."""
    arguments = typing.get_args(hint)
    return [leaf for argument in arguments for leaf in split_type(argument)] if arguments else [hint]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_names_in_the_text_exist(page: Path) -> None:
    groups = {field.name for field in dataclasses.fields(RunConfig)}
    stages = {stage.name for stage in STAGES}
    packages = ("convert", "launch", "prune_distill", "recipes", "tests")
    unknown = []
    for span in list_spans(page):
        name = span.partition("=")[0]
        first = name.partition(".")[0]
        if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", name) and not name.endswith((".json", ".jsonl", ".py", ".yaml")):
            is_module_name = first in packages and is_module(name)
            known = is_module_name or (first in groups and is_key(name)) or name in stages
            unknown += [span] if first in (*packages, *groups) and not known else []
        elif re.fullmatch(rf"({'|'.join(packages)}|conf|docs|requirements)/[\w./]*", span):
            unknown += [] if (ROOT / span).exists() else [span]
        elif span.startswith("make "):
            find_recipe(span.split()[1])
    assert unknown == []


def test_a_block_that_is_not_tested_has_a_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not tested: it needs a cluster -->\n\n```bash\nscontrol ping\n```\n\n```bash\nls\n```\n")
    first, second = read_blocks(page)
    assert (first.not_tested, first.text, second.not_tested) == ("it needs a cluster", "scontrol ping", None)


def test_keys() -> None:
    assert all(map(is_key, ("seed", "distill.kd.top_k", "data.sources", "prune.successive_halving.score.task")))
    assert not any(map(is_key, ("sed", "distill.kd.top", "prune.budget.none")))
