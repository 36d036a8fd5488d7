"""What vLLM's platform needs of this package: its worker, its attention backend, and a GPU that is new
enough.
"""

from dataclasses import dataclass

from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_longctx.config import LongContextError
from vllm_longctx.engine.memory_kv import FP8

CUDA_BACKEND = "vllm_longctx.cuda.sliding.LambdaBackend"


@dataclass(frozen=True)
class PlatformFacts:
    """What differs between platforms for an engine's arguments.

    folder: Of this package, with its worker.
    device: Of an engine's first rank.
    attention: Whose limits hold, in words.
    block_multiple: Of which block_size must be one, in tokens.
    kv_dtypes, kv_remedy: What kv_cache_dtype may be, and what to do about others.
    pool_settings: What makes vLLM's pool larger, and what sets its size.
    has_runner_v2: Our runners stand on Model Runner V2, too.
    trains_beside_engine: The trainer may use the engine's weights, on its device.
    """

    folder: str
    device: str
    attention: str
    block_multiple: int
    kv_dtypes: tuple[str, ...]
    kv_remedy: str
    pool_settings: tuple[str, tuple[str, ...]]
    has_runner_v2: bool
    trains_beside_engine: bool


CPU = PlatformFacts(
    folder="cpu",
    device="cpu",
    attention="vLLM's attention on the CPU",
    block_multiple=32,
    kv_dtypes=("auto",),
    kv_remedy="leave it at 'auto': on a CPU, keys are read back from the cache in the model's dtype",
    pool_settings=("VLLM_CPU_KVCACHE_SPACE", ("VLLM_CPU_KVCACHE_SPACE", "kv_cache_memory_bytes")),
    has_runner_v2=False,
    trains_beside_engine=False,
)
CUDA = PlatformFacts(
    folder="cuda",
    device="cuda:0",
    attention="longctx's attention on CUDA",
    block_multiple=16,
    kv_dtypes=("auto", *FP8),
    kv_remedy="leave it at 'auto', or give 'fp8'",
    pool_settings=("gpu_memory_utilization", ("kv_cache_memory_bytes",)),
    has_runner_v2=True,
    trains_beside_engine=True,
)


def platform() -> PlatformFacts:
    """Raises LongContextError for a platform without a worker of ours."""
    if current_platform.is_cuda():
        return CUDA
    if current_platform.is_cpu():
        return CPU
    raise LongContextError(
        f"longctx runs on vLLM's CPU and CUDA platforms, but this is {current_platform.device_name}"
    )


def memory_of_a_rank() -> int:
    """Bytes of which vLLM takes `gpu_memory_utilization`."""
    if platform() is CPU:
        return get_memory_node_info(get_visible_memory_node()[0]).total_memory
    return current_platform.get_device_total_memory()


def worker_of_platform() -> str:
    """Raises LongContextError for a platform without a worker of ours, or a GPU that is too old."""
    here = platform()
    if here is CUDA:
        from vllm_longctx.cuda.sliding import MIN_CAPABILITY

        check_capability(MIN_CAPABILITY, "longctx's attention", "use such a GPU, or vLLM for the CPU")
    return f"vllm_longctx.{here.folder}.worker.LongContextWorker"


def check_capability(needed: DeviceCapability, what: str, remedy: str) -> None:
    """Raises LongContextError for a GPU of an older compute capability."""
    capability = current_platform.get_device_capability()
    if capability is None or capability < needed:
        version = "unknown" if capability is None else capability.as_version_str()
        raise LongContextError(
            f"the compute capability of {current_platform.get_device_name()} is {version}, but {what} needs "
            f"{needed.as_version_str()} or newer; {remedy}"
        )


def choose_backend(args: EngineArgs) -> None:
    """On CUDA, vLLM's place for a backend of a plugin's.

    Raises LongContextError if the user asks for another, or another plugin has taken it.
    """
    if platform() is not CUDA:
        return
    asked = AttentionConfig.validate_backend_before(args.attention_backend) or args.attention_config.backend
    if asked is not None and asked != AttentionBackendEnum.CUSTOM:
        raise LongContextError(
            f"attention_backend = {asked.name}, but longctx brings its own; leave attention_backend out"
        )
    if args.attention_config.backend_per_kind:
        raise LongContextError(
            f"attention_config.backend_per_kind = {args.attention_config.backend_per_kind}, but longctx's "
            f"backend serves all "
            "layers; leave it out"
        )
    if (path := AttentionBackendEnum.CUSTOM.get_path()) != CUDA_BACKEND:
        raise LongContextError(
            f"another plugin has registered its own attention backend CUSTOM ({path}), and vLLM has one such "
            f"place; leave that "
            "plugin out, for example by VLLM_PLUGINS=longctx"
        )
    if args.attention_config.backend is None:
        args.attention_backend = AttentionBackendEnum.CUSTOM


def attention_backend() -> type[AttentionBackend]:
    """Whose limits hold on this platform.

    Imported here: either needs what the other platform may not have.
    """
    if platform() is CUDA:
        from vllm_longctx.cuda.sliding import LambdaBackend

        return LambdaBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
