"""The arguments of ``pyro-vae train`` and their YAML, read off signatures and docstrings."""

import inspect
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from pyro_vae import (
    presets,
)
from pyro_vae.parts import DEFAULTS, HELP, PARTS, PROVIDED, UsageError, did_you_mean, import_class


class Parser(ArgumentParser):
    """A parser whose errors are exceptions, so that they can be told in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(message)

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The arguments; a mistake is told in plain words."""
        try:
            return self.parse_args(list(argv))
        except (UsageError, ArgumentError) as error:
            raise UsageError(self._with_names(plain(str(error)), argv)) from None

    def _with_names(self, line: str, argv: Sequence[str]) -> str:
        """A message about an argument that there is not, with those that there are."""
        named = re.match(r"--(\w+)\.(\w+) is no argument of", line)
        if named and any(re.match(rf"--{named[1]}\.{named[2]}\b", word) for word in argv):
            part, word = named.groups()
            for cls in _chosen(argv, part)[-1:]:
                names = [name for name in inspect.signature(cls).parameters if name not in PROVIDED]
                own = f"it has {', '.join(names)}; --{part}.help {cls.__name__} explains" if names else "it has none"
                return f"--{part}.{word} is no argument of {cls.__name__}{did_you_mean(word, names)}: {own}."
        unknown = re.match(r"(--\w+)", line) if " is no argument: see pyro-vae COMMAND" in line else None
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            line = line.replace(" is no argument", f" is no argument{did_you_mean(unknown[1], options)}")
        return line.replace("pyro-vae COMMAND", self.prog)


class Formatter(DefaultHelpFormatter):
    """Keep the paragraphs of a docstring."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(super(Formatter, self)._fill_text(part, width, indent) for part in paragraphs)


def plain(message: str) -> str:
    """A parser's message in words a person would use."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(message.split())).replace("typing.", "")
    part = (re.search(r'Parser key "(\w+)', text) or ["", ""])[1]
    of_class = f"see --{part}.help CLASS for its arguments" if part in PARTS else "see pyro-vae COMMAND --help"
    patterns = [
        (r'key "([\w.]+)":? Expected an? (.+?)\. Got value: (\S+)', "--{0}: expected {1}, found {2}."),
        (r"Problem with given class_path '([\w.]+)': (.+?) - ", "--{part}: {1} (in the arguments of {0}): {of_class}."),
        (r"arguments are required: ([\w, ]+?)(?: -|$)", "--{part} needs --{part}.{0}: give it, or {of_class}."),
        (
            r"Parameter '(\w+)' from '(\S+)\.__init__' does not specify",
            "{1} needs the Python object {0}: use it in Python.",
        ),
        (
            r"Option '([\w.]+)' is not accepted",
            "--{part}.{0} is no argument of the {part} chosen: name the class first (--{part} CLASS), or {of_class}."
            if part in PARTS
            else "{0!r} is no argument: {of_class} for those that are.",
        ),
        (r"[Uu]nrecognized arguments: (.+)", "{0} is no argument: {of_class} for those that are."),
        (
            # The last of keys inside one another: what a schedule inside an objective may be.
            r'(?:.*key ")?\b(\w+)":? .*?Subtypes: \[((?:[^\[\]]|\[\w+\])+)\] Errors:.*?Given value: (.+?)(?: - |$)',
            "--{0}: expected {1}, found {2}: {of_class}.",
        ),
    ]
    for pattern, words in patterns:
        found = re.search(pattern, text)
        if found:
            values = list(found.groups())
            if words.startswith("--{0}") and part in PARTS and values[0] != part:
                values[0] = f"{part}.{values[0]}"
            if "Subtypes" in pattern:
                values[1] = " or ".join(kind for kind in values[1].split(", ") if kind != "NoneType")
            line = words.format(*values, part=part, of_class=of_class).replace(".init_args", "")
            return re.sub(r"expected float, found (-?inf|-?nan)\b", r"expected a finite number, found \1", line)
    return text


def description(command: Callable[..., None]) -> str:
    """The docstring of a command up to its arguments."""
    return (inspect.getdoc(command) or "").split("\n\nArgs:")[0]


def train_parser(command: Callable[..., None], argv: Sequence[str]) -> Parser:
    """The parser of ``train``: each part by class, then the command's own arguments.

    Args:
        command: the function behind ``train``.
        argv: its words, searched for classes that the parser must know of.
    """
    parser = Parser(prog="pyro-vae train", description=description(command), formatter_class=Formatter)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with any of these arguments.")
    parser.add_argument("--preset", help=f"The arguments of a well-known text: {', '.join(presets.PRESETS)}.")
    for part, (base, _) in PARTS.items():
        allowed = tuple(dict.fromkeys([base, *_chosen(argv, part)]))
        parser.add_subclass_arguments(allowed, part, skip=PROVIDED, required=False, help=HELP[part] + ".")
        if parser.groups and part in parser.groups:
            parser.groups[part].title = HELP[part].split("; null")[0]
    parser.add_function_arguments(command, skip={"config"})
    defaults = {part: {"class_path": path} for part, path in DEFAULTS.items()} | _preset(argv)
    # Where the words name a class there is no default: it would hand its arguments on, one particle to the IWAE.
    parser.set_defaults({name: v for name, v in defaults.items() if name not in PARTS or not _chosen(argv, name)})
    return parser


def _chosen(argv: Sequence[str], part: str) -> list[type]:
    """Classes that the arguments or the configuration files name for a part, so that the parser can learn of them."""
    names: list[Any] = []
    for i, word in enumerate(argv):
        follows = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else None
        for key in (f"--{part}", f"--{part}.class_path", f"--{part}.help"):
            if word == key:
                names.append(follows)
            elif word.startswith(key + "="):
                names.append(word.split("=", 1)[1])
        if word.startswith("--config"):
            file = word.split("=", 1)[1] if "=" in word else follows
            value = _read_yaml(Path(file)).get(part) if file else None
            names.append(value.get("class_path") if isinstance(value, dict) else value)
    return [import_class(name, part) for name in names if isinstance(name, str) and re.fullmatch(r"[\w.]+", name)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the configuration {path} ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise UsageError(f"expected {path} to hold a mapping of arguments, found {type(content).__name__}.")
    return content


def _preset(argv: Sequence[str]) -> dict[str, Any]:
    """The defaults that ``--preset NAME`` among the words stands for; a further word overrides each."""
    names = [word.split("=", 1)[1] for word in argv if word.startswith("--preset=")]
    names += [follows for word, follows in pairwise([*argv, ""]) if word == "--preset"]
    if not names:
        return {}
    try:
        chosen = presets.arguments(names[-1])
    except ValueError as error:
        raise UsageError(f"--preset: {error}{did_you_mean(names[-1], presets.PRESETS)}") from None
    return {name: _as_words(value) if name in PARTS else value for name, value in chosen.items()}


def _as_words(part: tuple[type, dict[str, Any]]) -> dict[str, Any]:
    cls, arguments = part
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    plain = {key: f"{v.__module__}.{v.__qualname__}" if isinstance(v, type) else v for key, v in plain.items()}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", **({"init_args": plain} if plain else {})}


def dump(command: Callable[..., None], config: Namespace) -> str:
    """A configuration as YAML that ``train --config`` reads; the folder of the run is no part of it."""
    config = config.clone()
    config.out = None
    config.pop("config", None)
    config.pop("preset", None)  # all that it stands for is written out
    chosen = [word for part in PARTS if config.get(part) for word in (f"--{part}", config[part].class_path)]
    return train_parser(command, chosen).dump(config)


def load_config(command: Callable[..., None], run: str) -> Namespace:
    """The configuration of a run folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        folder = Path(run) if Path(run).is_dir() else Path(run).parent
        runs = sorted(folder.glob("*/config.yaml"), key=lambda file: file.stat().st_mtime)
        names = ", ".join(str(file.parent) for file in runs[-5:])
        remedy = f"the latest there are {names}" if runs else "make one with pyro-vae train"
        raise UsageError(f"expected a run folder with a config.yaml, found none in {run}: {remedy}.")
    argv = ["--config", str(path)]
    return train_parser(command, argv).parse(argv)
