"""The command line: each command is made from the signature and docstring of a function."""

import errno
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentError, Namespace

import pyro_vae
from pyro_vae.arguments import Formatter, Parser, description, train_parser
from pyro_vae.command_evaluation import compare, evaluate
from pyro_vae.command_imputation import impute
from pyro_vae.command_laboratory import bench, derive, members, summary, wrong_loss
from pyro_vae.command_pictures import reconstruct, sample
from pyro_vae.command_sweep import sweep
from pyro_vae.command_training import resume, train
from pyro_vae.memory import keep_freed_memory
from pyro_vae.parallel import WorkerLost
from pyro_vae.parts import UsageError, did_you_mean

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "impute": impute,
    "resume": resume,
    "summary": summary,
    "wrong-loss": wrong_loss,
    "compare": compare,
    "derive": derive,
    "sweep": sweep,
    "members": members,
    "bench": bench,
}


FLAGS = {  # arguments without a value
    "json": "Print one JSON object instead of lines to read.",
    "markdown": "Print all as tables in Markdown.",
    "quick": "The tiny sizes only, two short rounds.",
}


def _parse(argv: Sequence[str]) -> tuple[str, Namespace]:
    top = f"""pyro-vae {pyro_vae.__version__}: variational autoencoders as two short Pyro programs.

usage: pyro-vae COMMAND [ARGUMENTS]

commands:
""" + "".join(f"  {name:12} {description(command).splitlines()[0]}\n" for name, command in COMMANDS.items())
    top += """
pyro-vae COMMAND --help explains one. To begin:

  pyro-vae train
  pyro-vae train --prior MixtureOfNormals --prior.num_components 10 --objective IWAE --objective.num_particles 50
  pyro-vae train --data MNIST --data.root DIR --latent_dim 50 --epochs 20
  pyro-vae train --preset seed001 --data.root DIR
"""
    if not argv or argv[0] in ("-h", "--help"):
        print(top, end="")
        raise SystemExit(0)
    if argv[0] == "--version":
        print(pyro_vae.__version__)
        raise SystemExit(0)
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command {name!r}{did_you_mean(name, COMMANDS)}: choose one of {', '.join(COMMANDS)}."
        )
    if name == "sweep":
        return name, _parse_sweep(rest)
    if name == "train":
        parser = train_parser(train, rest)
    else:
        command = COMMANDS[name]
        parser = Parser(prog=f"pyro-vae {name}", description=description(command), formatter_class=Formatter)
        optional_run = inspect.signature(command).parameters.get("run", inspect.Parameter).default is None
        skip: set[str | int] = {"runs", "workloads", *FLAGS, *(["run"] if optional_run else [])}
        parser.add_function_arguments(command, as_positional=True, skip=skip)
        if optional_run:
            parser.add_argument("run", nargs="?", help="The run folder.")
        if "runs" in inspect.signature(command).parameters:
            parser.add_argument("runs", nargs="+", help="The run folders, two or more.")
        if "workloads" in inspect.signature(command).parameters:
            parser.add_argument(
                "--workloads",
                nargs="+",
                help="Which: W1, W1b, Wk, Wc, Wd, tiny, iwae, epoch, evaluation; default: all.",
            )
        for flag in FLAGS.keys() & inspect.signature(command).parameters.keys():
            parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    return name, parser.parse(rest)


def _parse_sweep(argv: Sequence[str]) -> Namespace:
    """The sweep's own arguments; what is left is for ``train``."""
    own: list[str] = []
    words: list[str] = []
    names = [f"--{name}" for name in inspect.signature(sweep).parameters if name != "words"]
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name = word.split("=", 1)[0]
        if name in ("-h", "--help") or name in names:
            own.append("--vary+=" + word.split("=", 1)[1] if name == "--vary" and "=" in word else word)
            if name == "--vary" and "=" not in word:
                own[-1] = f"--vary+={rest.pop(0)}" if rest else "--vary+="
            elif name in names and name != "--json" and "=" not in word and rest:
                own.append(rest.pop(0))
        else:
            words.append(word)
    parser = Parser(prog="pyro-vae sweep", description=description(sweep), formatter_class=Formatter)
    parser.add_function_arguments(sweep, skip={"words", "json"}, as_positional=False)
    parser.add_argument("--json", action="store_true", help=FLAGS["json"])
    if not own or not any(word in ("-h", "--help") or word.startswith("--vary") for word in own):
        raise UsageError("--vary: expected an argument and its values, found none: --vary latent_dim=2,5,10.")
    found = parser.parse(own)
    return Namespace(**vars(found), words=words)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; mistakes are told in one line and end with exit code 2.

    Args:
        argv: the words after ``pyro-vae``; those of this process by default.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that --prior mine.MyPrior finds mine.py here
    try:
        name, arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        if name != "bench":  # which measures without it unless asked to
            keep_freed_memory()
        if name == "train":
            options = {key: arguments[key] for key in inspect.signature(train).parameters if key != "config"}
            train(config=arguments, **options)
        else:
            COMMANDS[name](**vars(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except WorkerLost as error:
        print(f"pyro-vae: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("pyro-vae: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        known = error.errno is not None and error.filename is not None
        remedy = "make room, or choose another path" if error.errno == errno.ENOSPC else "choose another path"
        _fail(f"cannot use {error.filename} ({error.strerror}): {remedy}." if known else str(error))
    except (UsageError, ArgumentError, ValueError, TypeError, ImportError) as error:
        _fail(f"{error}{_where(error)}")
    except Exception as error:
        if not _where(error):
            raise
        _fail(f"{type(error).__name__}: {error}{_where(error)}")


def _where(error: BaseException) -> str:
    """Where an error comes from, if from a class of the user's own: from neither this library nor an installed one."""
    installed = (Path(pyro_vae.__file__).parent, Path(sysconfig.get_path("stdlib")))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_absolute()
        and not any(Path(frame.filename).is_relative_to(folder) for folder in installed)
        and "site-packages" not in Path(frame.filename).parts
    ]
    return f" (in {frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _fail(message: str) -> NoReturn:
    print(f"pyro-vae: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
