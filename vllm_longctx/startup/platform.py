"""What vLLM's platform needs of this package: its worker, its attention backend, and a GPU that is new enough."""

from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_longctx.config import LongContextError

CUDA_BACKEND = "vllm_longctx.cuda.sliding.LambdaBackend"


def on_cuda() -> bool:
    return current_platform.is_cuda()


def worker_of_platform() -> str:
    """Raises LongContextError for a platform without a worker of ours, or a GPU that is too old."""
    if not (on_cuda() or current_platform.is_cpu()):
        raise LongContextError(f"longctx runs on vLLM's CPU and CUDA platforms, but this is {current_platform.device_name}")
    if on_cuda():
        from vllm_longctx.cuda.sliding import MIN_CAPABILITY

        check_capability(MIN_CAPABILITY, "longctx's attention", "use such a GPU, or vLLM for the CPU")
    return f"vllm_longctx.{'cuda' if on_cuda() else 'cpu'}.worker.LongContextWorker"


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
    """On CUDA, vLLM's place for a backend of a plugin's; the user must not ask for another, nor another plugin have taken it."""
    if not on_cuda():
        return
    asked = AttentionConfig.validate_backend_before(args.attention_backend) or args.attention_config.backend
    if asked not in (None, AttentionBackendEnum.CUSTOM):
        raise LongContextError(f"attention_backend = {asked.name}, but longctx brings its own; leave attention_backend out")
    if args.attention_config.backend_per_kind:
        raise LongContextError(
            f"attention_config.backend_per_kind = {args.attention_config.backend_per_kind}, but longctx's backend serves all "
            "layers; leave it out"
        )
    if (path := AttentionBackendEnum.CUSTOM.get_path()) != CUDA_BACKEND:
        raise LongContextError(
            f"another plugin has registered its own attention backend CUSTOM ({path}), and vLLM has one such place; leave that "
            "plugin out, for example by VLLM_PLUGINS=longctx"
        )
    if args.attention_config.backend is None:
        args.attention_backend = AttentionBackendEnum.CUSTOM


def attention_backend() -> type[AttentionBackend]:
    """Whose limits hold on this platform. Imported here: either needs what the other platform may not have."""
    if on_cuda():
        from vllm_longctx.cuda.sliding import LambdaBackend

        return LambdaBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
