"""The command `harp-hf`: the flags and YAML keys of `trl sft`, and ours beside them."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from .arguments import CutArguments, PushArguments, ReportArguments, VerifyArguments
from .errors import ConfigError, HarpError, reason
from .stopping import Terminated, stoppable

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig, TrlParser

    from .config import HarpConfig
    from .result import HarpResult

logger = logging.getLogger(__name__)

_COMMANDS = {
    "select": "measure a pool and write the selection",
    "measure": "measure a pool; select later with cut",
    "status": "say how far a run is, while it goes on or after it stopped",
    "cut": "select again from a finished run directory, in seconds",
    "report": "write an HTML report and figures of a finished run directory",
    "push": "push the selection of a finished run directory to the Hub, with a card",
    "verify": "finetune on the selection of a finished run and on random rows, and compare on test rows",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command `harp-hf`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in _COMMANDS:
        _usage(asked=bool(argv) and argv[0] in ("-h", "--help"), given=argv[:1])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # whatever the names of tasks, and whatever the terminal can show
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("harp_hf").setLevel(logging.INFO)
    try:
        with stoppable():
            if argv[0] in ("select", "measure"):
                _measure(argv[0], argv[1:])
            else:
                work = {"status": _status, "cut": _cut, "report": _report, "push": _push, "verify": _verify}
                work[argv[0]](argv[1:])
    except HarpError as error:
        _stop(argv[0], str(error))
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        how = ", ".join([f"stopped by {number.name}", *stop.args])
        _stop(argv[0], f"{how}; the same command continues where this one stopped.", code=128 + number)


def _stop(command: str, message: str, code: int = 1) -> NoReturn:
    # Under `accelerate launch` the main process says it first, and its end is the end of the others.
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(10)
    if code == 1:
        sys.exit(f"harp-hf {command}: {message}")
    print(f"harp-hf {command}: {message}", file=sys.stderr)
    sys.exit(code)


def _usage(asked: bool, given: list[str]) -> None:
    lines = [f"  {name:<8} {what}" for name, what in _COMMANDS.items()]
    text = "\n".join(["usage: harp-hf COMMAND [--config FILE] [flags]", "", *lines, "",
                      "Each command lists its flags with --help."])  # fmt: skip
    if asked:
        print(text)
        sys.exit(0)
    wrong = f"{given[0]!r} is not a command.\n" if given else ""
    sys.exit(wrong + text)


def _measure(command: str, argv: list[str]) -> None:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .config import MODEL_DEFAULTS, HarpConfig
    from .processes import is_main, leave

    @dataclass
    class HarpScriptArguments(ScriptArguments, DatasetMixtureConfig):
        eval_dataset_name: str | None = field(
            default=None, metadata={"help": "Path or name of the proxy set: rows with prompt and answer."}
        )
        eval_dataset_config: str | None = field(
            default=None, metadata={"help": "Configuration name of the proxy set on the Hub."}
        )
        selector: str | None = field(
            default=None, metadata={"help": "Choose with a baseline instead of HARP; only for `harp-hf select`."}
        )

    parser = _parser(command, HarpScriptArguments, HarpConfig, ModelConfig)
    parser.set_defaults(**MODEL_DEFAULTS)
    script, args, model = _parse(parser, argv)
    if args.log_level != "passive":
        logging.getLogger("harp_hf").setLevel({"detail": "DEBUG"}.get(args.log_level, args.log_level.upper()))
    if script.datasets and script.dataset_name:
        logger.warning("Both `datasets` and `dataset_name` are given: the pool is the mixture of `datasets`.")
        script.dataset_name = None
    needed = {"dataset_name": script.dataset_name or script.datasets, "eval_dataset_name": script.eval_dataset_name,
              "model_name_or_path": model.model_name_or_path}  # fmt: skip
    if missing := [name for name, value in needed.items() if not value]:
        raise ConfigError(f"--{missing[0]} is needed.")
    if script.selector is not None:
        if command == "measure":
            raise ConfigError("--selector is only for `harp-hf select`.")
        print(_select_with(script, args, model))
        return
    result = _run(script, args, model)
    if is_main():
        print(result.summary())
        if command == "select":
            print(f"Selection written to {_write(result.select(), args.output_dir, result.choice.variant)}.")
    leave()


def _parser(command: str, *settings: Any) -> TrlParser:
    from trl import TrlParser

    class Parser(TrlParser):
        """Says what is wrong, instead of listing two hundred flags before it."""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message[:1].upper()}{message[1:]}; `harp-hf {command} --help` lists the flags.")

    return Parser(settings, prog=f"harp-hf {command}")


def _parse(parser: TrlParser, argv: list[str]) -> Any:
    if argv[-1:] == ["--config"]:
        raise ConfigError("--config needs the path of a YAML file.")
    try:
        return parser.parse_args_and_config(argv)
    except HarpError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The flags or the config file cannot be used: {reason(error)}.") from error


def _run(script: Any, args: HarpConfig, model: ModelConfig) -> HarpResult:
    from .manifest import describe_call
    from .processes import from_main
    from .rundir import RunDir
    from .selection import measure
    from .status import read_status

    asked = describe_call(args, model, script)
    try:
        result = measure(*_inputs(script, args, model))
    except KeyboardInterrupt as stop:
        with suppress(HarpError):
            stop.args = (read_status(args.output_dir or "harp_output").progress,)
        raise
    from_main(lambda: RunDir(args.output_dir or "harp_output").write_yaml("config.yaml", asked))
    return result


def _inputs(script: Any, args: HarpConfig, model: ModelConfig) -> tuple[Any, ...]:
    """Pool, proxy set, model, settings and adapter, in the order of `measure`."""
    from trl import DatasetMixtureConfig

    from .pool import load_rows
    from .processes import main_first
    from .proxy import load_proxy
    from .settings import adapter, model_kwargs

    if script.dataset_streaming:
        raise ConfigError("A pool is read several times: --dataset_streaming cannot be used.")
    if not model.use_peft:
        raise ConfigError("Leaf finetunes are adapters: --use_peft cannot be switched off.")
    args.model_init_kwargs = model_kwargs(model) | (args.model_init_kwargs or {}) or None
    pool: Any = DatasetMixtureConfig(script.datasets, script.streaming, script.test_split_size)
    if not script.datasets:
        pool = main_first(lambda: load_rows(
            script.dataset_name, name=script.dataset_config, split=script.dataset_train_split
        ))  # fmt: skip
    proxy = main_first(lambda: load_proxy(
        script.eval_dataset_name, name=script.eval_dataset_config, split=script.dataset_test_split
    ))  # fmt: skip
    return pool, proxy, model.model_name_or_path, args, adapter(model)


def _select_with(script: Any, args: HarpConfig, model: ModelConfig) -> str:
    from .baselines import MEASURED
    from .baselines.choose import check_selector, choose

    name, script.selector = script.selector, None
    check_selector(name, args)  # what is wrong is said before anything is read
    result = None
    if name in MEASURED:
        with _choice_kept(args.output_dir or "harp_output"):
            result = _run(script, args, model)
    rows, cost = choose(name, *_inputs(script, args, model), result=result)
    return f"{cost}\nSelection written to {_write(rows, args.output_dir or 'harp_output', name)}."


@contextmanager
def _choice_kept(output_dir: str) -> Iterator[None]:
    """What a finished run chooses stays its own choice: a baseline only starts from what it has measured."""
    from .result import Choice
    from .rundir import RunDir
    from .saved import save_choice

    if not Path(output_dir, "result", "result.json").exists():
        yield
        return
    run, names = RunDir(output_dir), [field.name for field in fields(Choice)]
    choice, config = run.read_json("result/result.json")["choice"], run.read_yaml("config.yaml")
    try:
        yield
    finally:
        save_choice(choice, run.path)
        written = {name: value for name, value in run.read_yaml("config.yaml").items() if name not in names}
        kept = {name: written.get(name, value) for name, value in config.items() if name in (*names, *written)}
        run.write_yaml("config.yaml", kept | written)


def _status(argv: list[str]) -> None:
    from .status import read_status

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message[:1].upper()}{message[1:]}.")

    parser = Parser(prog="harp-hf status", description=f"{_COMMANDS['status'].capitalize()}.")
    parser.add_argument("run", metavar="RUN", help="The run directory.")
    print(read_status(parser.parse_args(argv).run).summary())


def _cut(argv: list[str]) -> None:
    from .saved import load_result

    (asked,) = _parse(_parser("cut", CutArguments), argv)
    result = load_result(asked.output_dir)
    result = result.choosing(asked.variant, asked.budget, asked.task_weights, asked.active_tasks, asked.budget_by)
    print(result.summary())
    print(f"Selection written to {_write(result.select(), asked.output_dir, result.choice.variant)}.")


def _report(argv: list[str]) -> None:
    from .report import write_report
    from .saved import load_result

    (asked,) = _parse(_parser("report", ReportArguments), argv)
    print(f"Report written to {write_report(load_result(asked.output_dir), asked.output_dir)}.")


def _push(argv: list[str]) -> None:
    from .saved import load_result

    (asked,) = _parse(_parser("push", PushArguments), argv)
    if not asked.repo_id:
        raise ConfigError("--repo_id is needed: the name of the dataset on the Hub.")
    result = load_result(asked.output_dir)
    result = result.choosing(asked.variant, asked.budget, asked.task_weights, asked.active_tasks, asked.budget_by)
    url = result.push_to_hub(asked.repo_id, private=asked.private, token=asked.token, revision=asked.revision)
    print(f"Selection pushed to {url}.")


def _verify(argv: list[str]) -> None:
    from .proxy import load_proxy
    from .verify import verify_run

    (asked,) = _parse(_parser("verify", VerifyArguments), argv)
    if not asked.eval_dataset_name:
        raise ConfigError("--eval_dataset_name is needed: test rows that neither the pool nor the proxy set holds.")
    test = load_proxy(asked.eval_dataset_name, name=asked.eval_dataset_config, split=asked.dataset_test_split)
    proof = verify_run(
        asked.output_dir, test, variant=asked.variant, budget=asked.budget, task_weights=asked.task_weights,
        active_tasks=asked.active_tasks, budget_by=asked.budget_by, whole_pool=asked.whole_pool, epochs=asked.epochs,
        seeds=asked.seeds, metric=asked.metric, model=asked.model_name_or_path,
    )  # fmt: skip
    print(proof.summary())


def _write(rows: Dataset, output_dir: str, name: str) -> str:
    from .quiet import quiet
    from .rundir import RunDir

    with quiet():
        path = RunDir(output_dir).write(f"result/{name}/train.parquet", rows.to_parquet)
    return f"{path.parent} ({len(rows)} rows)"


if __name__ == "__main__":
    main()
