"""The oracle of the matrix: transformers' own model in float64, with our geometry as its attention.

A family needs no class of its own. transformers computes everything but the attention, which is
`reference.attention` at the distances of the method: queries and keys come to it unrotated, since every
rotary module is told not to turn, and the angles are those of the module's own float64 frequencies.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from tests.support.architectures import TRAINED, Architecture
from tests.support.reference_model import PLAIN, Layers, alike
from vllm_longctx.geometry import Geometry, alibi_slopes
from vllm_longctx.reference import attention
from vllm_longctx.rotary import Rotary

OURS = "longctx_oracle"
LESS = (torch.float32, torch.bfloat16, torch.float16)


class Exact(TorchFunctionMode):
    """Everything that asks for less than float64 gets float64: norms, softmaxes, angles, and their tables."""

    def __enter__(self) -> "Exact":
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.set_default_dtype(self.before)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.bfloat16, Tensor.half):
            func = Tensor.double
        args = tuple(self._raised(a) for a in args)
        return func(*args, **{name: self._raised(a) for name, a in (kwargs or {}).items()})

    @staticmethod
    def _raised(argument: Any) -> Any:
        return torch.float64 if isinstance(argument, torch.dtype) and argument in LESS else argument


def in_float64(architecture: Architecture, path: Path, implementation: str = "eager") -> PreTrainedModel:
    """The checkpoint as transformers' model; what is called below `Exact` is float64 throughout.

    Where vLLM computes otherwise than transformers, and no method has to do with it, so does this model.
    """
    loaded = architecture.model_class.from_pretrained(path, dtype=torch.float32)
    config = architecture.config_class.from_pretrained(path)
    config._attn_implementation, config._experts_implementation = implementation, "eager"
    with Exact():
        model = architecture.model_class(config).eval()
    model.load_state_dict(loaded.state_dict())
    for block in modules(model, "BloomMLP"):
        block.gelu_impl = nn.GELU()  # transformers approximates it, which moves log-probabilities by 2e-3
    if architecture.family == "Phimoe":
        model.lm_head.bias.data.zero_()  # vLLM loads it and leaves it out
    return model


def modules(model: nn.Module, name: str) -> list[Any]:
    """Those whose class has a name that ends so."""
    return [module for module in model.modules() if type(module).__name__.endswith(name)]


class Oracle:
    """A checkpoint of transformers'.

    longest: The distance in tokens that no key exceeds; LongRoPE has factors for short ones and for long.
    margins: Of the last text; see `reference.attention`.
    """

    def __init__(self, architecture: Architecture, path: Path, longest: int = TRAINED):
        self.longest = architecture.scaled_at or longest
        self.architecture, self.margins = architecture, list[float]()
        by_hand = BY_HAND.get(architecture.family)
        self.model = in_float64(architecture, path, "eager" if by_hand else OURS)
        self.rotaries: dict[str | None, Rotary] = {}
        self.slopes: Tensor | None = None
        for module in modules(self.model, "RotaryEmbedding"):
            self._stop_turning(module)
        for module in modules(self.model, "Attention"):
            module.oracle = self
            if by_hand is not None:
                by_hand(self, module)

    def logprobs(
        self, ids: list[int], seen: Geometry | Layers = PLAIN, seen_by_own: Layers | None = None
    ) -> Tensor:
        """float64 [tokens, vocab]: log-probabilities of the token after each position.

        seen: By layers without a window of their own. seen_by_own: By those with one; by default that.
        """
        self.layers = alike(seen) if isinstance(seen, Geometry) else seen
        self.own_layers = seen_by_own or alike(Geometry(0, self.architecture.window))
        self.margins.clear()
        tokens = torch.tensor([ids])
        with Exact(), torch.no_grad():
            # Only GPT-J has angles elsewhere than in a rotary module: none at position 0.
            output = self.model(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False)
            return output.logits[0].log_softmax(-1)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        **own: Any,
    ) -> Tensor:
        """query [1, heads, T, d], key and value [1, kv_heads, T, d]; returns [1, T, heads, d].

        window: Of the layer's own. own: Further arguments of `reference.attention`.
        """
        layer, row = module.layer_idx, self.architecture
        assert (window is not None) == (layer in row.own_windows)
        layers = self.layers if window is None else self.own_layers
        seen, rotates = layers(layer, torch.arange(query.shape[2]))
        seen = [branch for branch in seen if branch.visible.any()]
        rotary = self._rotary(layer) if rotates and layer not in row.unrotated else None
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention(*tokens, seen, scale, rotary, self.slopes, self.margins, **own)[None]

    def _rotary(self, layer: int) -> Rotary | None:
        if len(self.rotaries) < 2:  # none with ALiBi, one for all layers, or one for each type of layer
            return next(iter(self.rotaries.values()), None)
        return self.rotaries[self.model.config.layer_types[layer]]

    def _stop_turning(self, module: Any) -> None:
        """Keeps the module's frequencies. What it is asked for is the factor of its scaling only."""
        head_size = getattr(self.model.config, "head_dim", None) or 32
        last = torch.tensor([[self.longest - 1]])
        still: dict[str | None, tuple[Tensor, Tensor]] = {}
        for layer_type in getattr(module, "layer_types", [None]):
            with Exact():
                cos, sin = module(torch.empty(0), last, *([layer_type] if layer_type else []))
            frequencies = getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
            self.rotaries[layer_type] = Rotary(
                head_size, 2 * len(frequencies), not self.architecture.interleaved, frequencies
            )
            still[layer_type] = (cos**2 + sin**2).sqrt(), torch.zeros_like(sin)
        module.forward = lambda x, position_ids, layer_type=None: still[layer_type]


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls a function of its attention interface."""
    own = {"soft_cap": softcap, "sinks": s_aux}
    given = {name: x for name, x in own.items() if x is not None}
    window = sliding_window or None  # Qwen2-MoE says 0
    return module.oracle.attend(module, query, key, value, scaling, window, **given), None


AttentionInterface.register(OURS, _interface)


# Families whose attention does not go through that interface.


def _gptj(oracle: Oracle, module: Any) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        output = oracle.attend(module, query, key, value, 1 / module.scale_attn)
        return output.transpose(1, 2), None

    # Row 1 of its table has the sines of the frequencies, of which none is above 1.
    frequencies = module.embed_positions[1, : module.rotary_dim // 2].asin()
    oracle.rotaries[None] = Rotary(module.head_dim, module.rotary_dim, False, frequencies)
    module._attn = attend


def _falcon(oracle: Oracle, module: Any) -> None:
    def forward(hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden)))
        return module.dense(oracle.attend(module, *heads, module.inv_norm_factor).flatten(2)), None

    if module.config.alibi:
        oracle.slopes = alibi_slopes(module.num_heads) * module.inv_norm_factor
        oracle.rotaries.clear()
    module.forward = forward


def _bloom(oracle: Oracle, module: Any) -> None:
    def forward(hidden: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads = module._reshape(module.query_key_value(hidden))
        attended = oracle.attend(module, *heads, module.inv_norm_factor)
        return module.dense(attended.flatten(2)) + residual, None

    oracle.slopes = alibi_slopes(module.num_heads)
    module.forward = forward


def _mpt(oracle: Oracle, module: Any) -> None:
    def forward(hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads = (x.unflatten(-1, (module.n_heads, -1)) for x in module.Wqkv(hidden).chunk(3, -1))
        attended = oracle.attend(module, *(x.transpose(1, 2) for x in heads), module.softmax_scale)
        return module.out_proj(attended.flatten(2)), None

    oracle.slopes = alibi_slopes(module.n_heads)
    module.forward = forward


BY_HAND: dict[str, Callable[[Oracle, Any], None]] = {
    "GPTJ": _gptj,
    "Falcon": _falcon,
    "Bloom": _bloom,
    "Mpt": _mpt,
}
