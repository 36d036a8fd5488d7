"""How the trainer gets the engine's model, and the check that both have the same one, and adapt it alike.

The trainer gets values in place of names where there are any: the Hugging Face config after every override,
and the files that vLLM loaded. What can still differ (the contents of a file, a model that vLLM and
transformers compute differently) shows in the log-probabilities of a short text, the probe. Both compute them
before the first request.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from hashlib import blake2b
from statistics import pstdev
from typing import Any

import torch
import vllm.envs as envs
from transformers import PreTrainedModel
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor import Executor
from vllm.v1.request import Request, RequestStatus

from vllm_longctx.config import KEY, LongContextError
from vllm_longctx.models.properties import (
    TEXT_ONLY,
    TRAINED_WINDOW,
    check_load_format,
    model_dtype,
    trained_architectures,
)
from vllm_longctx.settings import Adaptation, TrainerSettings, active_settings
from vllm_longctx.temp_lora.messages import Ready
from vllm_longctx.temp_lora.shared_weights import skeleton

logger = init_logger("vllm.longctx")

PROBE_TOKENS = 64
NAMES = ("_name_or_path", "transformers_version")  # of a config; no part of the model
# That multiply numbers of a dtype, by their names in `torch.cpu.get_capabilities`.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of each file of weights, for `identity`
# The largest share of `logprob_difference` that one model may show, by the device's type. Measured on the
# CPU, for a trained model and random ones of up to 24 layers: at most 4e-6, 0.007 and 0.03. With YaRN's
# factor 2 on one side only: 0.14 to 1. A GPU's kernels compute float32 as TF32, which has float16's mantissa.
TOLERANCES = {
    "cpu": {torch.float32: 2e-3, torch.float16: 0.04, torch.bfloat16: 0.2},
    "cuda": {torch.float32: 0.04, torch.float16: 0.04, torch.bfloat16: 0.2},
}
MIN_SPREAD = 1e-2  # nats; the log-probabilities of an untrained model hardly differ
# Settings of vLLM that decide which weights are loaded, or how the model computes.
MODEL_SETTINGS = (
    "revision",
    "hf_overrides",
    "hf_config_path",
    "config_format",
    "quantization",
    "model_impl",
    "disable_sliding_window",
    "trust_remote_code",
)
LOAD_SETTINGS = ("load_format", "download_dir")


def resolved_config(model: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config that the engine computes with, after all overrides."""
    config = json.loads(model.hf_text_config.to_json_string(use_diff=False))
    # We set the first two; the last names code of the checkpoint, which is not run.
    for key in ("model_max_length", TRAINED_WINDOW, TEXT_ONLY, "auto_map"):
        config.pop(key, None)
    return config | {"architectures": trained_architectures(model)}


def trainer_dtype(model: ModelConfig, trainer: TrainerSettings) -> torch.dtype:
    """Of the trainer's weights. Without instructions for 16 bits, a CPU converts what it multiplies."""
    dtype = model_dtype(model)
    if trainer.dtype is not None:
        return getattr(torch, trainer.dtype)
    can = torch.cpu.get_capabilities()
    has_instructions = trainer.device != "cpu" or any(can.get(name) for name in INSTRUCTIONS.get(dtype, ()))
    return dtype if has_instructions else torch.float32


def trained_model(vllm_config: VllmConfig, trainer: TrainerSettings | None = None) -> PreTrainedModel:
    """The trainer's model without weights, on `meta`. trainer: Decides its dtype, else the engine does."""
    model = vllm_config.model_config
    of_weights = model_dtype(model) if trainer is None else trainer_dtype(model, trainer)
    dtype = str(of_weights).removeprefix("torch.")
    with set_current_vllm_config(vllm_config):  # for classes of transformers' that vLLM has made its own
        return skeleton(model.model, dtype, "sdpa", resolved_config(model))


def weight_files(vllm_config: VllmConfig) -> list[str]:
    """The files that vLLM loaded the model from.

    Where these have Mistral's own format, Hugging Face's files beside them.

    Raises LongContextError if there are none that the trainer can load.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    check_load_format(load)
    if load.load_format in ("auto", "mistral"):
        load = replace(load, load_format="hf")
    _, files, *_ = DefaultModelLoader(load)._prepare_weights(model.model, None, model.revision, True, None)
    if any(file.rpartition("/")[2].startswith("consolidated") for file in files):
        raise LongContextError(
            f"model {model.model} has its weights in Mistral's own format only, which the trainer cannot "
            "load; give a checkpoint in Hugging Face's, or leave adaptation out"
        )
    return sorted(files)


def identity(vllm_config: VllmConfig) -> bytes:
    """Names the model's weights, as engine and trainer compute with them, for the addresses of versions.

    Neither the checkpoint's name nor its place is in it. Of large files a part is read: to read all of them
    would take as long as to load them.
    """
    model = vllm_config.model_config
    config = {key: value for key, value in resolved_config(model).items() if key not in NAMES}
    trainer = active_settings(vllm_config).temp_lora.trainer
    dtypes = map(str, (model_dtype(model), trainer_dtype(model, trainer)))
    about = json.dumps([config, *dtypes], sort_keys=True)
    found = blake2b(about.encode(), digest_size=32)
    try:
        files = weight_files(vllm_config)
    except LongContextError:  # a format of vLLM's own, where the trainer shares the engine's weights
        found.update(f"{model.model} {model.revision}".encode())
        files = []
    for path in files:
        size = os.stat(path).st_size
        found.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for part in range(SAMPLES):
                file.seek(part * size // SAMPLES)
                found.update(file.read(SAMPLE_BYTES))
    return found.digest()


def probe(model: ModelConfig, adaptation: Adaptation) -> list[int]:
    """Token ids of the probe: random ones, twice, so that the second half can be predicted.

    It is so short that every query sees all tokens before it. Empty if not even two tokens are so short.
    """
    length = min(PROBE_TOKENS, adaptation.window_tokens, model.max_model_len - 1)
    if length < 2:
        return []
    vocabulary, bos = model.get_vocab_size(), getattr(model.hf_text_config, "bos_token_id", None)
    first = [bos] if isinstance(bos, int) and 0 <= bos < vocabulary else []
    half = random.Random(0).choices(range(vocabulary), k=PROBE_TOKENS // 2)
    return [*first, *half, *half][:length]


def probe_logprobs(
    scheduler: Scheduler,
    executor: Executor,
    tokens: Sequence[int],
    begin: Callable[[str], None] = lambda request_id: None,
) -> list[float]:
    """The engine's log-probabilities of the tokens after the first, in nats.

    The request for them adapts without training, so its KV is never published to the prefix cache. Raises
    LongContextError if the KV cache does not hold it.

    begin: Called with the request's id once the scheduler has it.
    """
    options = {KEY: {"temp_lora": True, "epochs": 0, "attention": "plain"}}  # as the trainer's model
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        detokenize=False,
        extra_args=options,
    )
    request = Request("longctx-probe", list(tokens), params, None)
    scheduler.add_request(request)
    begin(request.request_id)
    logprobs: list[float] = []
    while scheduler.has_requests():
        step = scheduler.schedule()
        if scheduler.has_unfinished_requests() and not step.total_num_scheduled_tokens:
            scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
            raise LongContextError("the KV cache does not hold a single request that adapts; make it larger")
        output = executor.execute_model(step)
        if output is None:
            output = executor.sample_tokens(None)
        for outputs in scheduler.update_from_output(step, output).values():
            for o in outputs.outputs:
                if o.new_prompt_logprobs_tensors is not None:
                    logprobs += o.new_prompt_logprobs_tensors.logprobs[:, 0].tolist()
    return logprobs


def logprob_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The 90th percentile of differences of log-probabilities: in nats, and as a share of our spread.

    The 90th percentile, because a few very unlikely tokens decide any other figure. The spread (standard
    deviation), because rounding errors grow with the logits. NaN in both is no difference, in one of them an
    infinite one.
    """
    differences = sorted(_abs_difference(a, b) for a, b in zip(ours, theirs, strict=True))
    finite = [a for a in ours if math.isfinite(a)]
    spread = max(pstdev(finite), MIN_SPREAD) if finite else 1.0
    largest = differences[int(0.9 * (len(differences) - 1))]
    return largest, largest / spread


def _abs_difference(a: float, b: float) -> float:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b)
    return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf


def mismatch(
    ready: Ready,
    *,
    ours: Sequence[float],
    vllm_config: VllmConfig,
    address: str | None,
) -> str | None:
    """How the trainer's model differs from the engine's, and what to do. None if they are the same.

    ready: The trainer's report, with its log-probabilities of the probe.
    ours: The engine's, in nats; empty without a probe.
    address: Of a trainer that was joined.
    """
    model = vllm_config.model_config
    difference = difference_beyond_rounding(ours, ready.logprobs, model)
    if difference is None:
        return None
    causes = "; ".join(unusual_settings(vllm_config))
    if address is not None:
        where = f"adaptation.trainer.address = {address!r}"
        remedy = f"start the trainer at {where} with the engine's model, or leave address out"
    elif causes:
        remedy = "leave out what the trainer does not understand of these settings, or adaptation"
    else:
        remedy = "see whether the checkpoint was changed while the engine started, or leave adaptation out"
    return (
        f"has another model than the engine: {difference}. It has {ready.about}, the engine {model.model} "
        f"with {causes or 'no unusual settings'}; {remedy}"
    )


def difference_beyond_rounding(
    ours: Sequence[float], theirs: Sequence[float], model: ModelConfig, without: Sequence[float] = ()
) -> str | None:
    """How far log-probabilities of one text differ; None if rounding explains it, or there are none.

    without: Ours without an adapter, if one is compared. What it changes is then the measure: in a deep model
    of 16 bits a strange adapter grows rounding errors, too.
    """
    if not ours:
        return None
    nats, share = logprob_difference(ours, theirs)
    compared, measure = "the model", "their spread"
    if without:
        changes, _ = logprob_difference(ours, without)
        share = nats / max(changes, MIN_SPREAD)
        compared, measure = "an adapter", "what it changes"
    allowed = TOLERANCES[current_platform.device_type][model_dtype(model)]
    what = f"log-probabilities of the same text differ by {nats:.2g} nats, {share:.2g} of {measure}"
    if share > allowed:
        return f"{what}, where {model.dtype} explains {allowed:g}"
    logger.info("longctx: the trainer computes %s as the engine does: %s", compared, what)
    return None


def unusual_settings(vllm_config: VllmConfig) -> list[str]:
    """Settings other than vLLM's defaults that decide what weights are loaded, or how the model computes."""
    model, load = vllm_config.model_config, vllm_config.load_config
    found = []
    for section, names in ((model, MODEL_SETTINGS), (load, LOAD_SETTINGS)):
        defaults = {f.name: f.default for f in fields(section)}
        values = {name: getattr(section, name) for name in names}
        found += [(name, value) for name, value in values.items() if value and value != defaults[name]]
    overrides = model.hf_overrides
    if isinstance(overrides, dict):  # without our own entry
        found = [(name, value) for name, value in found if name != "hf_overrides"]
        if own := {key: value for key, value in overrides.items() if key != "model_max_length"}:
            found.append(("hf_overrides", own))
    if envs.VLLM_USE_MODELSCOPE:
        found.append(("VLLM_USE_MODELSCOPE", True))
    scaling = (getattr(model.hf_text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling != "default":
        found.append(("rope_type", scaling))
    return [f"{name} = {value!r}" for name, value in found]
