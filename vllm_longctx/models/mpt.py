"""MPT (https://www.mosaicml.com/blog/mpt-7b), which vLLM dropped after 0.28: a decoder with ALiBi positions.

Checkpoints are those of `transformers.MptForCausalLM`, and so are the names of weights and of config entries.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import MptConfig
from transformers.models.mpt.configuration_mpt import MptAttentionConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_longctx.geometry import alibi_slopes


def check_config(config: MptConfig) -> None:
    """Raises ValueError for a variant of MPT whose layers are not the published models'."""
    attention = attention_config(config)
    refused = {
        "attn_config.alibi is false": not attention.alibi,
        "attn_config.attn_type is not multihead_attention": attention.attn_type != "multihead_attention",
        "attn_config.qk_ln is true": attention.qk_ln,
        "attn_config.prefix_lm is true": attention.prefix_lm,
        "no_bias is false": not config.no_bias,
        "logit_scale is set": config.logit_scale is not None,
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"longctx's MPT cannot run this checkpoint: {reason}")


def attention_config(config: MptConfig) -> MptAttentionConfig:
    assert isinstance(config.attn_config, MptAttentionConfig)  # MptConfig makes it of a dict
    return config.attn_config


class MptAttention(nn.Module):
    def __init__(
        self, config: MptConfig, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str
    ):
        super().__init__()
        head_size = config.hidden_size // config.n_heads
        attention = attention_config(config)
        self.clip = attention.clip_qkv
        self.Wqkv = QKVParallelLinear(
            config.hidden_size,
            head_size,
            config.n_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.Wqkv",
        )
        self.out_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.out_proj",
        )
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        slopes = alibi_slopes(config.n_heads, attention.alibi_bias_max)
        self.attn = Attention(
            config.n_heads // ranks,
            head_size,
            attention.softmax_scale or head_size**-0.5,
            alibi_slopes=slopes.chunk(ranks)[rank].tolist(),
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv, _ = self.Wqkv(x)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        query, key, value = qkv.chunk(3, -1)
        output, _ = self.out_proj(self.attn(query, key, value))
        return output


class MptMLP(nn.Module):
    def __init__(self, config: MptConfig, quant: QuantizationConfig | None, prefix: str):
        super().__init__()
        inner = 4 * config.hidden_size
        self.up_proj = ColumnParallelLinear(
            config.hidden_size, inner, bias=False, quant_config=quant, prefix=f"{prefix}.up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: Tensor) -> Tensor:
        inner, _ = self.up_proj(x)
        output, _ = self.down_proj(nn.functional.gelu(inner))
        return output


class MptBlock(nn.Module):
    def __init__(
        self, config: MptConfig, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str
    ):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, bias=False)
        self.attn = MptAttention(config, cache, quant, f"{prefix}.attn")
        self.norm_2 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, bias=False)
        self.ffn = MptMLP(config, quant, f"{prefix}.ffn")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.ffn(self.norm_2(x))


@support_torch_compile
class MptModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, MptConfig)
        cache, quant = vllm_config.cache_config, vllm_config.quant_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            MptBlock(config, cache, quant, f"{prefix}.blocks.{number}") for number in range(config.n_layers)
        )
        self.norm_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, bias=False)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = block(x)
        return self.norm_f(x)


class MptForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, MptConfig)
        check_config(config)
        self.transformer = MptModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.transformer.wte(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.transformer(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
