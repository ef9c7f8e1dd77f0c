"""`ampo-fast`: train, the stages alone, inspect, report. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_STAGES = {
    "generate": "sample candidates for prompts",
    "score": "add rewards to candidates",
    "embed": "write the candidates' embeddings beside the rows",
    "select": "mark the positive and the k negatives of each group",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.command in ("inspect", "report"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        return options.run(options, overrides)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("AMPO_FAST_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with --resume auto", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from ampo_fast import __version__

    parser = argparse.ArgumentParser(prog="ampo-fast", description="Active Multi-Preference Optimization of language models.")
    parser.add_argument("--version", action="version", version=f"ampo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train from a config file or a recipe",
        usage="ampo-fast train CONFIG [--section.field VALUE ...] [--dry-run] [--print-config] [--resume auto]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    train.add_argument("config", nargs="?", help="a TOML file, or a recipe that ships: quickstart, offline")
    train.add_argument("-h", "--help", action="store_true", help="show this text with every config field, and stop")
    train.add_argument("--dry-run", action="store_true", help="show data, masks, lengths, memory and cost, then stop")
    train.add_argument("--print-config", action="store_true", help="print the resolved config as TOML, then stop")
    train.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on from the newest checkpoint")
    train.set_defaults(run=_train, parser=train)
    for name, text in _STAGES.items():
        stage = commands.add_parser(
            name, help=text, description=f"{text}; resumes where it was stopped.",
            usage=f"ampo-fast {name} CONFIG --input FILE --output FILE [--section.field VALUE ...]",
        )  # fmt: skip
        stage.add_argument("config", help="a TOML file or a recipe")
        stage.add_argument("--input", type=Path, required=name != "generate", help="the stage file before")
        stage.add_argument("--output", type=Path, required=True, help="JSON Lines, one prompt a line")
        stage.set_defaults(run=_stage)
    inspect = commands.add_parser("inspect", help="look at the groups of a stage or rollout file")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--id", help="only this prompt")
    inspect.add_argument("--limit", type=int, default=3, help="how many prompts (default 3)")
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser("report", help="write report.html of a run directory again")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)
    return parser


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.config import load_config

    if options.help or options.config is None:
        options.parser.print_help()
        print(_fields_help())
        return 0 if options.help else 2
    config = load_config(options.config, overrides)
    if options.print_config:
        import tomli_w

        values = config.model_dump(mode="json", exclude_none=True)
        print(tomli_w.dumps(values), end="")
        return 0
    _quiet_libraries()
    if options.dry_run:
        from ampo_fast.preview import dry_run

        dry_run(config)
        return 0
    from ampo_fast.trainer import train

    summary = train(config, resume=options.resume == "auto")
    print(json.dumps(summary), flush=True)
    return 0


def _fields_help() -> str:
    from pydantic_core import PydanticUndefined

    from ampo_fast.config import field_paths

    lines = ["config fields:"]
    for path, info in field_paths():
        if info.is_required():
            default = "required"
        elif info.default is PydanticUndefined:
            default = repr(info.default_factory())
        else:
            default = repr(info.default) if not isinstance(info.default, Path) else repr(str(info.default))
        lines.append(f"  --{path:32} [{default}] {info.description or ''}".rstrip())
    return "\n".join(lines)


def _stage(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.config import load_config

    config = load_config(options.config, overrides)
    _quiet_libraries()
    from ampo_fast import stages

    added = getattr(stages, options.command)(config, options.input, options.output)
    print(json.dumps({"output": str(options.output), "rows_added": added}))
    return 0


def _inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from ampo_fast.inspect_rows import inspect

    inspect(options.file, only=options.id, limit=options.limit, console=Console(width=None if sys.stdout.isatty() else 120))
    return 0


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    from ampo_fast.report import write_report

    if not (options.run_dir / "config.json").is_file():
        raise ValueError(f"{options.run_dir} is not a run directory: it has no config.json")
    print(write_report(options.run_dir))
    return 0


def _quiet_libraries() -> None:
    """Warnings of ours on stderr; the libraries' own progress bars off, since ours shows the work."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
