"""The recipe that a checkpoint recommends for Temp-LoRA: a small model wants another one."""

import json
from pathlib import Path
from typing import Any

import vllm.envs as envs
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
from vllm.transformers_utils.utils import is_cloud_storage

from vllm_longctx.config import MAX_RANK, SIZES, AdaptationSection, LongContextConfig, LongContextError
from vllm_longctx.temp_lora.messages import Recipe

logger = init_logger("vllm.longctx")

RECOMMENDED = "longctx.json"  # beside the checkpoint's config.json: {"adaptation": {a recipe}}
RECOMMENDABLE = (*Recipe.__struct_fields__, *SIZES)


def with_recommended(adaptation: AdaptationSection, args: EngineArgs) -> AdaptationSection:
    """With the recipe of the checkpoint's RECOMMENDED, where the user says nothing: a small model wants
    another one.

    Whatever else is in that file, it says nothing of this machine and is ignored, with a warning that names
    it.
    """
    recommended, ignored = read_recommended(args.model, args.revision)
    limits = {"rank": adaptation.max_rank or MAX_RANK, "epochs": adaptation.max_epochs}
    for name in list(recommended):
        if name in adaptation.model_fields_set:
            recommended.pop(name)
        elif name in limits and recommended[name] > limits[name]:
            ignored.append(f"adaptation.{name} = {recommended.pop(name)} (the limit is {limits[name]})")
    if ignored:
        logger.warning("longctx: %s of model %s: ignored: %s", RECOMMENDED, args.model, "; ".join(ignored))
    return adaptation.with_recommended(recommended)


def read_recommended(model: str, revision: str | None) -> tuple[dict[str, Any], list[str]]:
    """The valid entries of the recipe that a checkpoint recommends, and what else its file says.

    model: path or name.
    """
    if is_cloud_storage(model) or (envs.VLLM_USE_MODELSCOPE and not Path(model).is_dir()):
        return {}, []  # vLLM reads single files of neither
    try:
        content = get_hf_file_bytes(RECOMMENDED, model, revision or "main")
        document = {} if content is None else json.loads(content)
    except Exception as e:  # of the hub's, of JSON's, of the file system's: nothing here may stop an engine
        return {}, [f"the whole file ({type(e).__name__}: {e})"]
    sections = document if isinstance(document, dict) else {"the whole file": document}
    entries = sections.pop("adaptation", {})
    ignored = [_short(name, value) for name, value in sections.items()]
    if not isinstance(entries, dict):
        return {}, [*ignored, _short("adaptation", entries)]
    recommended = {}
    for name, value in entries.items():
        try:
            if name not in RECOMMENDABLE:
                raise LongContextError
            recommended[name] = getattr(
                LongContextConfig.parse({"adaptation": {name: value}}).adaptation, name
            )
        except LongContextError:
            ignored.append(_short(f"adaptation.{name}", value))
    return recommended, ignored


def _short(name: str, value: Any) -> str:
    text = repr(value)
    return f"{name} = {text if len(text) <= 80 else text[:80] + '…'}"
