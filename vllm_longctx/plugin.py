"""vLLM's door to this package: the entry point `longctx` in the group `vllm.general_plugins`.

`register` runs in every process of vLLM. It makes the KV spec known and wraps three methods of EngineArgs; it changes
nothing for an engine without a `longctx` configuration.
"""

import argparse
import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_longctx import engine_args, kv_cache
from vllm_longctx.config import KEY, PRESETS, LongContextError, checked_json

MIDDLEWARE = "vllm_longctx.serving.RequestChecks"


def register() -> None:
    kv_cache.register()
    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        _wrap_create_engine_config()
        _wrap_cli()


def _wrap_create_engine_config() -> None:
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(create_engine_config)
    def create(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config = engine_args.prepare(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        if config is not None:
            engine_args.complete(config, vllm_config)
            from vllm_longctx import serving  # the front end's modules, which other processes do not load

            serving.check_engine_requests()
        return vllm_config

    EngineArgs.create_engine_config = create


def _wrap_cli() -> None:
    """Add the flags to every parser built on EngineArgs, and fold them into additional_config."""
    add_cli_args, from_cli_args = EngineArgs.add_cli_args, EngineArgs.from_cli_args

    @functools.wraps(add_cli_args)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_cli_args(parser)
        group = parser.add_argument_group("longctx", "Texts far longer than the model was trained on (vllm-longctx).")
        group.add_argument("--plugin", choices=["longctx"], help="Run the plugin, by default with preset lm-infinite.")
        group.add_argument("--longctx", type=_checked_json, help="Its configuration as JSON.")
        group.add_argument("--longctx-preset", choices=sorted(PRESETS), help="A preset to start from.")
        return parser

    @functools.wraps(from_cli_args)
    def from_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        if hasattr(args, "longctx"):
            args.additional_config = engine_args.additional_config_from_flags(
                args.additional_config, args.plugin, args.longctx, args.longctx_preset
            )
            args.plugin = args.longctx = args.longctx_preset = None
        middleware = getattr(args, "middleware", None)  # an option of `vllm serve`
        if middleware is not None and KEY in (args.additional_config or {}) and MIDDLEWARE not in middleware:
            args.middleware = [*middleware, MIDDLEWARE]
        return from_cli_args.__func__(cls, args)

    EngineArgs.add_cli_args = staticmethod(add)
    EngineArgs.from_cli_args = classmethod(from_args)


def _checked_json(text: str) -> dict[str, Any]:
    try:
        return checked_json(text)
    except LongContextError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
