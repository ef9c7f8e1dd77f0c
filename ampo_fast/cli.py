"""`ampo-fast`: train, train-reward, evaluate, the stages alone, inspect, report. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

_STAGES = {
    "generate": "sample candidates for prompts",
    "score": "add rewards to candidates",
    "embed": "write the candidates' embeddings beside the rows",
    "select": "mark the positive and the k negatives of each group",
}
_OVERRIDES = "[--section.field VALUE ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for a user's mistake (one `error:` line), 130 for Ctrl-C."""
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_field_hint(options, unknown[0])}")
    if overrides and not hasattr(options, "config"):
        parser.error(f"{options.command} reads no config: unrecognized arguments: {' '.join(overrides)}")
    try:
        return options.run(options, overrides)
    except BrokenPipeError:  # `ampo-fast inspect FILE | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError, MemoryError) as error:
        if os.environ.get("AMPO_FAST_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "--resume auto goes on" if options.command == "train" else "the same command goes on"
        print(f"interrupted; {hint}", file=sys.stderr)
        return 130


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse reads, ["--section.field", "value", ...]).

    argparse alone would take the value of an unknown option for CONFIG, and a value like -1 for an option.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals:
            overrides += [value for value in (next(rest, None),) if value is not None]
    return own, overrides


def _field_hint(options: argparse.Namespace, argument: str) -> str:
    """For an option of a trainer of another make: the field that it may mean."""
    if not (hasattr(options, "config") and argument.startswith("--")):
        return ""
    from ampo_fast.config import nearest_field

    nearest = nearest_field(argument.lstrip("-").partition("=")[0], _schema(options.command))
    return f"; did you mean --{nearest}?" if nearest else ""


def _one_line(error: Exception) -> str:
    """The message; a single problem under its source becomes one line, several keep theirs."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return " ".join(lines) if len(lines) <= 2 else "\n  ".join(lines)


def _config_help() -> str:
    recipes = sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))
    recipes = [name for name in recipes if not name.startswith("reward")]  # those are train-reward's
    return f"a TOML file, or a recipe that ships: {', '.join(recipes)}"


# --- the parser -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from ampo_fast import __version__

    parser = argparse.ArgumentParser(
        prog="ampo-fast",
        description="Active Multi-Preference Optimization of language models.",
        epilog="`ampo-fast train --help` lists every field of the configuration.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ampo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_train_reward(commands)
    _add_evaluate(commands)
    for name, text in _STAGES.items():
        _add_stage(commands, name, text)
    inspect = commands.add_parser("inspect", help="look at the groups of a stage or rollout file", allow_abbrev=False)
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--id", help="only this prompt")
    inspect.add_argument("--limit", type=_count, default=3, help="how many prompts (default 3)")
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser(
        "report", help="write report.html of a run directory again, or the page of a stage file", allow_abbrev=False
    )
    report.add_argument("path", type=Path, metavar="PATH", help="a run directory, or what `select` wrote")
    report.set_defaults(run=_report)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train from a config file or a recipe",
        usage=f"ampo-fast train CONFIG {_OVERRIDES} [--dry-run] [--print-config] [--resume auto|never]",
        allow_abbrev=False,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp)
    train.add_argument("config", metavar="CONFIG", help=_config_help())
    train.add_argument("--dry-run", action="store_true", help="show data, masks, lengths, memory and cost, then stop")
    train.add_argument("--print-config", action="store_true", help="print the resolved config as TOML, then stop")
    _add_resume(train, "checkpoint")
    train.set_defaults(run=_train)


def _add_resume(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help=f"auto: go on from the newest {what}, where there is one (default never)",
    )


def _add_train_reward(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train-reward",
        help="train a reward model on scored pairs or groups",
        usage=f"ampo-fast train-reward CONFIG {_OVERRIDES} [--print-config] [--resume auto|never]",
        allow_abbrev=False,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp)
    train.add_argument("config", metavar="CONFIG", help='a TOML file, or the recipe "reward"')
    train.add_argument("--print-config", action="store_true", help="print the resolved config as TOML, then stop")
    _add_resume(train, "evaluation")
    train.set_defaults(run=_train_reward)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a reward model, or a policy's implicit rewards, on pairs or groups",
        allow_abbrev=False,
    )
    evaluate.add_argument("--reward-model", metavar="DIR", help="a sequence classifier with one output")
    evaluate.add_argument("--policy", metavar="DIR", help="a causal LM: its implicit rewards are measured")
    evaluate.add_argument("--reference", metavar="DIR", help="the model that the policy was trained from")
    evaluate.add_argument("--beta", type=float, default=0.1, help="of the implicit rewards (default 0.1)")
    evaluate.add_argument("--pairs", required=True, metavar="FILE", help="pairs or groups, as data.train reads them")
    evaluate.add_argument("--limit", type=_count, help="only the first so many rows (default all)")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="also write the page with the diagrams")
    evaluate.add_argument("--json", action="store_true", help="one JSON object instead of text")
    evaluate.set_defaults(run=_evaluate)


class _TrainHelp(argparse.Action):
    """--help with every config field, which must be read from the config classes: only then they are imported."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this text with every config field, and stop")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.print_help()
        print(f"\n{fields_help(_schema(parser.prog.split()[-1]))}")
        parser.exit()


def _schema(command: str) -> type:
    from ampo_fast.config import Config
    from ampo_fast.reward_model.config import RewardTrainingConfig

    return RewardTrainingConfig if command == "train-reward" else Config


def _add_stage(commands: argparse._SubParsersAction, name: str, text: str) -> None:
    is_first = name == "generate"
    given = "[--input FILE]" if is_first else "--input FILE"
    stage = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}; goes on where it was stopped.",
        usage=f"ampo-fast {name} CONFIG {given} --output FILE {_OVERRIDES}",
        allow_abbrev=False,
    )
    stage.add_argument("config", metavar="CONFIG", help=_config_help())
    source = "prompts (default data.train)" if is_first else "the file of the stage before"
    # Text, not a Path, where it may be package:NAME or a data set's name.
    stage.add_argument("--input", type=str if is_first else Path, required=not is_first, metavar="FILE", help=source)
    stage.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON Lines, one prompt a line")
    stage.set_defaults(run=_stage)


def fields_help(schema: type | None = None) -> str:
    """Every config field with its default and description, one a line; the advanced ones and those of inner sections last."""
    from ampo_fast.config import Config, field_paths

    common = dict(field_paths(schema or Config))
    advanced = {path: info for path, info in field_paths(schema or Config, is_full=True) if path not in common}
    lines = ["config fields, all as --section.field VALUE:", *map(_field_line, common.items())]
    return "\n".join([*lines, "", "advanced:", *map(_field_line, advanced.items())])


def _field_line(field: tuple[str, Any]) -> str:
    from pydantic_core import PydanticUndefined

    path, info = field
    if info.is_required():
        default = "required"
    else:
        value = info.default_factory() if info.default is PydanticUndefined else info.default
        default = repr(str(value)) if isinstance(value, Path) else repr(value)
    is_choice = get_origin(info.annotation) is Literal
    choices = f"One of {', '.join(get_args(info.annotation))}. " if is_choice else ""
    return f"  --{path:26} [{default}] {choices}{info.description or ''}".rstrip()


# --- the commands -----------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.config import load_config

    config = load_config(options.config, overrides)
    if options.print_config:
        return _print_config(config)
    _quiet_libraries()
    if options.dry_run:
        from ampo_fast.preview import dry_run

        dry_run(config)
        return 0
    from ampo_fast.trainer import train

    summary = train(config, resume=options.resume == "auto")
    if _is_main_rank():  # under torchrun every rank has the summary
        print(json.dumps(summary), flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is on disk. Python's shutdown would unwind gloo's threads, and on a busy machine it has ended a
        # finished rank with "terminate called without an active exception": torchrun then calls the run a failure.
        sys.stderr.flush()
        os._exit(0)
    return 0


def _print_config(config: Any) -> int:
    import tomli_w

    # TOML has no null; every field that may be None has None as its default.
    print(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), end="")
    return 0


def _train_reward(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.config import load_config

    config = load_config(options.config, overrides, _schema("train-reward"))
    if options.print_config:
        return _print_config(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train-reward runs in one process: start it without torchrun")
    _quiet_libraries()
    from ampo_fast.reward_model.training import train_reward

    print(json.dumps(train_reward(config, resume=options.resume == "auto")), flush=True)
    return 0


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    _quiet_libraries()
    from ampo_fast.evaluate import Scorer, evaluate_file, summary_text

    scorer = Scorer(
        reward_model=options.reward_model, policy=options.policy, reference=options.reference, beta=options.beta
    )
    result = evaluate_file(scorer, options.pairs, options.html, options.limit)
    print(json.dumps(result) if options.json else summary_text(result), flush=True)
    return 0


def _stage(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.config import load_config

    config = load_config(options.config, overrides)
    _quiet_libraries()
    from ampo_fast import stages

    added = getattr(stages, options.command)(config, options.input, options.output)
    print(json.dumps({"output": str(options.output), "rows_added": added}), flush=True)
    return 0


def _inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from ampo_fast.inspect_rows import inspect

    is_terminal = sys.stdout.isatty()
    # Not rich's own test: FORCE_COLOR would let control characters into a file.
    console = Console(force_terminal=is_terminal, no_color=not is_terminal, width=None if is_terminal else 120)
    inspect(options.file, only=options.id, limit=options.limit, console=console)
    sys.stdout.flush()
    return 0


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.path.is_file():
        from ampo_fast.report import write_stage_page

        print(write_stage_page(options.path))
        return 0
    from ampo_fast.report import write_report

    if not (options.path / "config.json").is_file():
        raise ValueError(f"{options.path} is not a run directory: it has no config.json")
    print(write_report(options.path))
    return 0


def _is_main_rank() -> bool:
    """Whether this is torchrun's first process, or the only one; torch is not imported to ask."""
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    """Our warnings on stderr, the libraries' progress bars off: ours shows the work. Call before importing them."""
    level = logging.WARNING if _is_main_rank() else logging.ERROR  # every rank would say the same
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
