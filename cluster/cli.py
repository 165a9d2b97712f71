"""The `hocket` command. Flags are generated from the config structs; what a command needs is imported when it runs.

Exit 0: stopped; 1: failed; 2: wrong use.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from ..lab.cli import add_commands as add_lab_commands
from ..router.config import RouterConfig
from ..workers.config import WorkerConfig
from . import config as cluster
from .settings import Setting, SettingsError, add_flags, read_file, refuse_unknown, refuse_unknown_variables, resolve
from .settings import settings_of as _settings_of

ROUTER = _settings_of(RouterConfig)
WORKER = _settings_of(WorkerConfig, leave_out=("role",))
COMMON = _settings_of(cluster.CommonConfig)
_EVERY_SETTING = (*ROUTER, *WORKER, *cluster.SERVE, *COMMON)

_PRECEDENCE = (
    "Every setting can also be given as a variable (--sim-itl-ms as HOCKET_SIM_ITL_MS) or in the file of --config; "
    "a flag wins over a variable, a variable over the file."
)


class _Parser(argparse.ArgumentParser):
    """Full names only, and a misspelt flag is answered with the nearest one."""

    def __init__(self, **options: object) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": formatter, **options})  # type: ignore[arg-type]  # argparse passes its own options through.

    def parse_known_args(  # type: ignore[override]  # argparse overloads it over the namespace's type; ours has one.
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """A flag is refused by the command it was given to, which knows its own flags best."""
        options, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return options, extra

    def error(self, message: str) -> NoReturn:
        word = next((word for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
        hint = f" (did you mean {near[0]}?)" if near and message.startswith("unrecognized") else ""
        print(f"{self.prog}: {message}{hint}\nsee {self.prog} --help", file=sys.stderr)
        sys.exit(2)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # Takes a tenth of the time of --help.

        print(f"hocket {version('hocket')}")
        sys.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="hocket", description="Disaggregated LLM serving over a message bus.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    serve = _command(commands, "serve", "run a whole cluster on this machine, until Ctrl-C")
    add_flags(serve, "cluster", cluster.SERVE)
    add_flags(serve, "every worker ([worker] in the file)", cluster.EVERY_WORKER)
    add_flags(serve, "router ([router] in the file)", cluster.THE_ROUTER)
    report = serve.add_argument_group("check")
    checked = "start nothing: print what FILE (or --config and the flags) takes of this machine and what does not fit"
    report.add_argument("--check", metavar="FILE", nargs="?", const="", help=f"{checked} (default: no)")
    report.add_argument("--json", action="store_true", help="with --check: print it as JSON (default: no)")
    serve.set_defaults(run=_serve)

    router = _command(commands, "router", "run one router, or several on one port")
    add_flags(router, "router", [*ROUTER, *COMMON])
    add_flags(router, "processes", cluster.PROCESSES)
    router.set_defaults(run=_router)

    worker = commands.add_parser("worker", help="run one worker", description="Run one worker.")
    roles = worker.add_subparsers(dest="role", required=True, metavar="ROLE", parser_class=_Parser)
    for role, work in (("prefill", "computes prompts"), ("decode", "makes the tokens")):
        one = _command(roles, role, f"run one worker that {work}")
        add_flags(one, f"{role} worker", [*WORKER, *COMMON])
        one.set_defaults(run=_worker)

    doctor = _command(commands, "doctor", "measure every prefill-decode link and say what to do about slow ones")
    add_flags(doctor, "pool", cluster.DOCTOR)
    report = doctor.add_argument_group("report")
    local = "measure every installed transport between two processes of this machine; needs no pool (default: no)"
    report.add_argument("--local", action="store_true", help=local)
    report.add_argument("--json", metavar="FILE", default="", help="write it as JSON, too (default: none)")
    doctor.set_defaults(run=_doctor)

    _add_policy_commands(commands)
    explain = _command(commands, "explain", "print why a request went where it went")
    explain.add_argument("request_id", metavar="REQUEST_ID", help="the x-request-id of its answer")
    add_flags(explain, "pool", cluster.POOL)
    explain.add_argument("--json", action="store_true", help="print it as JSON (default: no)")
    explain.set_defaults(run=_explain)

    top = _command(commands, "top", "show a pool's routers and workers, live; Ctrl-C ends it")
    add_flags(top, "pool", cluster.POOL)
    top.add_argument("--once", action="store_true", help="print it once and end (default: no)")
    top.add_argument("--json", action="store_true", help="print it as JSON, one line each time (default: no)")
    top.add_argument(
        "--every-s", metavar="SECONDS", type=float, default=1.0, help="time between two looks (default: 1)"
    )
    top.set_defaults(run=_top)

    model = commands.add_parser("model", help="find or fetch models", description="Find or fetch models.")
    actions = model.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    fetch = "fetch and convert the demo model unless it is there, and print its folder"
    actions.add_parser("demo", help=fetch, description=fetch).set_defaults(run=_model, name="demo")
    path = actions.add_parser("path", help="print the folder of a model", description="Print the folder of a model.")
    path.add_argument("name", metavar="NAME", help="a folder, a Hugging Face id (fetched unless cached), or demo")
    path.set_defaults(run=_model)
    add_lab_commands(commands)
    return parser


def _add_policy_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    summary = "show or change which policies decide, in every router at once"
    policy = commands.add_parser("policy", help=summary, description=f"{summary.capitalize()}.")
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    name = "an installed policy, module:Class or path/to/file.py:Class, with options: kv?temperature=0.5"

    show = _command(actions, "show", "print which policies decide, what they cost and how their requests fared")
    show.add_argument("--json", action="store_true", help="print it as JSON (default: no)")
    primary = _command(actions, "set", "let a policy decide for every request; a canary ends, shadows stay")
    primary.add_argument("policy", metavar="POLICY", help=name)
    for flag, unit, kind, what in (
        ("--pick-budget-ms", "MS", float, "time a pick may take"),
        ("--failures-max", "N", int, "so many failures in a window, raised or over the budget, replace the policy"),
        ("--window-s", "SECONDS", float, "length of a window"),
    ):
        primary.add_argument(flag, metavar=unit, type=kind, default=None, help=f"{what} (default: as before)")
    canary = _command(actions, "canary", "let a policy decide for a share of the sessions")
    canary.add_argument("policy", metavar="POLICY", nargs="?", default="", help=name)
    canary.add_argument(
        "--share", metavar="SHARE", type=float, default=0.1, help="share above 0, at most 1 (default: 0.1)"
    )
    canary.add_argument("--off", action="store_true", help="end it (default: no)")
    shadow = _command(actions, "shadow", "ask policies about every request and never obey them")
    shadow.add_argument("policies", metavar="POLICY", nargs="*", help=f"{name}; exactly these are asked from now on")
    shadow.add_argument("--off", action="store_true", help="ask none (default: no)")
    back = _command(actions, "rollback", "go back to the last good policies before the current ones")
    for action in (show, primary, canary, shadow, back):
        add_flags(action, "pool", cluster.POOL)
        action.set_defaults(run=_policy)


def _command(commands: argparse._SubParsersAction[_Parser], name: str, summary: str) -> _Parser:
    sentence = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=sentence, epilog=_PRECEDENCE)
    parser.formatter_class = argparse.HelpFormatter  # Wraps the epilog.
    parser.add_argument(
        "--config",
        metavar="FILE",
        default="",
        help="settings in TOML, or JSON when the name ends in .json; - is JSON on stdin",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except SettingsError as error:
        return _refuse(error, 2)
    except KeyboardInterrupt:
        return _refuse("interrupted", 1)


def _refuse(why: object, exit_code: int) -> int:
    print(f"hocket: {why}", file=sys.stderr)
    return exit_code


def _file(options: argparse.Namespace) -> tuple[Mapping[str, object], str]:
    """The file's settings and how to name it in an error."""
    refuse_unknown_variables(os.environ, _EVERY_SETTING)
    if options.config == "-":
        try:
            return msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, object]), "stdin"
        except msgspec.DecodeError as error:
            raise SettingsError(f"--config -: {error}") from error
    return (read_file(Path(options.config)), options.config) if options.config else ({}, "")


def _given(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, object]:
    file, where = _file(options)
    refuse_unknown(file, [setting.name for setting in settings], where)
    return resolve(settings, flags=vars(options), environ=os.environ, file=file, where=where)


def _plan(options: argparse.Namespace) -> cluster.Plan:
    file, where = _file(options)
    return cluster.plan_from(flags=vars(options), environ=os.environ, file=file, where=where)


def _check(options: argparse.Namespace) -> int:
    from .check import check, refused  # As below.

    options.config = options.config or options.check
    try:
        return check(_plan(options), as_json=options.json)
    except SettingsError as error:
        return refused(error, as_json=options.json)


def _serve(options: argparse.Namespace) -> int:
    if options.check is not None:
        if options.check and options.config:
            raise SettingsError("--check FILE and --config name a file each; leave one out")
        return _check(options)
    if options.json:
        raise SettingsError("--json is for the report of --check; give --check FILE")
    plan = _plan(options)
    from .model import ModelError  # Not needed for --help, and it must be fast.
    from .serve import ServeError, serve

    try:
        return serve(plan)
    except (ServeError, ModelError) as error:
        return _refuse(error, 1)


def _doctor(options: argparse.Namespace) -> int:
    config = msgspec.convert(_given(options, cluster.DOCTOR), cluster.DoctorConfig)
    cluster.check_names(pool=config.pool)
    from .doctor import DoctorError, doctor  # numpy and nats-py; --help must be fast.
    from .logs import set_up_logging

    set_up_logging("error")
    try:
        return doctor(nats=config.nats, pool=config.pool, is_local=options.local, json_file=options.json)
    except DoctorError as error:
        return _refuse(error, 1)


def _pool(options: argparse.Namespace) -> cluster.PoolConfig:
    from .logs import set_up_logging  # As for what these commands import: --help must be fast.

    config = msgspec.convert(_given(options, cluster.POOL), cluster.PoolConfig)
    cluster.check_names(pool=config.pool)
    set_up_logging("error")
    return config


def _policy(options: argparse.Namespace) -> int:
    config = _pool(options)
    if options.action in ("canary", "shadow"):
        given = options.policy if options.action == "canary" else options.policies
        if bool(given) == options.off:
            raise SettingsError(f"policy {options.action}: give a POLICY or --off")
    import asyncio

    from . import policy
    from .operate import OperateError, change_policies, show_policies

    edit: policy.Edit | None = None  # Back.
    if options.action == "set":
        limits = {name: getattr(options, name) for name in ("pick_budget_ms", "failures_max", "window_s")}
        edit = policy.set_primary(options.policy, {name: value for name, value in limits.items() if value is not None})
    elif options.action == "canary":
        edit = policy.set_canary(options.policy, options.share)
    elif options.action == "shadow":
        edit = policy.set_shadows(options.policies)
    try:
        if options.action == "show":
            return asyncio.run(show_policies(config, as_json=options.json))
        return asyncio.run(change_policies(config, edit))
    except OperateError as error:
        return _refuse(error, 1)


def _explain(options: argparse.Namespace) -> int:
    config = _pool(options)
    import asyncio

    from .operate import OperateError, explain

    try:
        return asyncio.run(explain(config, options.request_id, as_json=options.json))
    except OperateError as error:
        return _refuse(error, 1)


def _top(options: argparse.Namespace) -> int:
    config = _pool(options)
    if not 0 < options.every_s <= 3600:
        raise SettingsError("--every-s is above 0 and at most 3600")
    import asyncio

    from .operate import OperateError
    from .top import show_top

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # So that the terminal is left as it was.
    try:
        return asyncio.run(show_top(config, is_once=options.once, as_json=options.json, every_s=options.every_s))
    except OperateError as error:
        return _refuse(error, 1)
    except KeyboardInterrupt:
        return 0


def _router(options: argparse.Namespace) -> int:
    values = _given(options, [*ROUTER, *COMMON, *cluster.PROCESSES])
    log_level = _pop_log_level(values)
    given = values.pop("processes", 1)
    processes = given if isinstance(given, int) else 1
    config = msgspec.convert(values, RouterConfig)
    cluster.check_names(pool=config.pool, router_id=config.router_id)
    if processes == 1:
        return _run_process(log_level, config, _run_router)
    return _run_process(log_level, config, lambda config: _run_routers(config, processes, log_level))


def _worker(options: argparse.Namespace) -> int:
    values = _given(options, [*WORKER, *COMMON])
    log_level = _pop_log_level(values)
    config = msgspec.convert({**values, "role": options.role}, WorkerConfig)
    cluster.check_names(pool=config.pool, worker_id=config.worker_id)
    return _run_process(log_level, config, _run_worker)


def _pop_log_level(values: dict[str, object]) -> str:
    return str(values.pop("log_level", cluster.CommonConfig().log_level))


# What these two import takes longer than --help may: Starlette and uvicorn, and the engine's libraries.
def _run_router(config: RouterConfig) -> int:
    import uvloop  # Its reads cost a third less than asyncio's, and every figure was measured with it.

    from ..router.main import run_router

    exit_code: int = uvloop.run(run_router(config))
    return exit_code


def _run_routers(config: RouterConfig, processes: int, log_level: str) -> int:
    from .routers import PortTaken, run_routers

    try:
        return run_routers(config, processes, log_level)
    except PortTaken as error:
        return _refuse(error, 1)


def _run_worker(config: WorkerConfig) -> int:
    import uvloop

    from ..workers.worker import run_worker

    exit_code: int = uvloop.run(run_worker(config))
    return exit_code


Config = TypeVar("Config", RouterConfig, WorkerConfig)


def _run_process(log_level: str, config: Config, run: Callable[[Config], int]) -> int:
    """The edge of a router's or worker's process: logging, the model's folder, the exit code."""
    import logging

    from .logs import set_up_logging
    from .model import ModelError, default_served_name, resolve_model

    set_up_logging(log_level)
    try:
        folder = resolve_model(config.model)
    except ModelError as error:
        return _refuse(error, 1)
    served_name = config.served_name or default_served_name(config.model, folder)
    try:
        return run(msgspec.structs.replace(config, model=str(folder), served_name=served_name))
    except Exception:  # The process's edge: the log has the reason, the shell the status.
        logging.getLogger("hocket.cluster.cli").exception("ended by a failure that was not expected")
        return 1


def _model(options: argparse.Namespace) -> int:
    from .model import ModelError, resolve_model

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # So that pip and the conversion end with it.
    try:
        print(resolve_model(options.name))
    except ModelError as error:
        return _refuse(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
