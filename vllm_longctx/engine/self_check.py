"""Whether the layers of an engine attend as its method says, found at start, before anything is served.

One layer of each kind reads a made-up text from the engine's own KV cache, by its own metadata and kernels.
What it gives is compared with `reference.attention` over the branches of `geometry`:

- A query inside the window, which sees all that it would see in stock vLLM.
- A chunk of queries that crosses the window's end.
- A query far past it.

Layers of stepped windows (`Role.WINDOW`, `Role.MEMORY`) are compared inside their first window, and the
top-k branch of `Role.KEPT` is left out: both depend on what model runners do to the KV cache between steps.

What positions do to queries and keys before attention sees them is found in `positions`.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_longctx import reference
from vllm_longctx.config import LongContextError
from vllm_longctx.engine.layers import LayerSite
from vllm_longctx.engine.rows import StepTimes
from vllm_longctx.geometry import branches
from vllm_longctx.models.properties import TESTED, model_dtype
from vllm_longctx.modes import Role
from vllm_longctx.rotary import Rotary

logger = init_logger("vllm.longctx")

INSIDE, CHUNK = 48, 4  # tokens
AT_ONCE = 1024  # tokens whose keys and values are made and written at once
MARKED = 24  # keys that have weight, at most, for one text
REPORT = "report it in the project's issues, with the model's config.json"
# Of the largest element. On a CPU, the layers of five models with head sizes of 32 to 256 erred by at most
# 2.0e-6, 6.7e-4 and 7.5e-3, over up to 13 random texts for each position. With a soft cap, under which scores
# are large, it was 1.1e-5 and 2.6e-2 (float32, bfloat16).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WITH_SOFT_CAP = 3  # times as much


def self_check(
    sites: Sequence[LayerSite], attn_groups: Any, rows: StepTimes, vllm_config: VllmConfig, is_first: bool
) -> None:
    """Check the layers of an engine whose KV cache is bound, if its configuration or architecture asks for
    it.

    attn_groups: The model runner's. is_first: Of the ranks, the one that logs.

    Leaves nothing in the KV cache. Raises LongContextError naming a layer that attends to something else.
    """
    model = vllm_config.model_config
    is_tested, asked = model.architecture in TESTED, sites[0].settings.self_check
    is_checked = not is_tested if asked is None else asked
    if is_checked:
        seconds = rows.selection_seconds
        check_layers(sites, attn_groups, vllm_config, is_first)
        rows.selection_seconds = seconds
    if is_first and not is_tested:
        name = ", ".join(dict.fromkeys((*model.architectures, model.architecture)))
        checked = "its layers passed the self-check" if is_checked else "longctx.self_check is false"
        logger.info(
            "longctx: architecture %s was not tested; %s. Tell us how it does: the project's issues",
            name,
            checked,
        )


def check_layers(
    sites: Sequence[LayerSite], attn_groups: Any, vllm_config: VllmConfig, is_first: bool
) -> None:
    """One layer of each kind. Arguments and errors as of `self_check`."""
    kinds = {kind(site): site for site in reversed(sites)}
    for site in kinds.values():
        builder = own_builder(site, attn_groups, vllm_config)
        for first, end in spans(site, vllm_config):
            with torch.inference_mode():
                text = Text(site, first, end, model_dtype(vllm_config.model_config))
                if len(text.columns) >= len(site.layer.kv_cache):
                    if is_first:
                        logger.warning(
                            "longctx: the self-check of layer %s leaves out position %d: the KV cache has %d "
                            "blocks",
                            site.name,
                            end - 1,
                            len(site.layer.kv_cache),
                        )
                    continue
                error, allowed = text.error(attended(text, builder)), text.tolerance
            if not error <= allowed:  # also of NaN
                raise LongContextError(
                    f"longctx cannot serve layer {site.name}: in the self-check, its attention at position "
                    f"{end - 1:,} is off by {error:.2g} of its largest value, and {allowed:.2g} is allowed "
                    f"for {text.dtype}; {REPORT}"
                )


def kind(site: LayerSite) -> tuple[Any, ...]:
    """Layers with the same value attend in the same way."""
    stock = site.stock
    return (
        site.role,
        site.window,
        site.rotary,
        stock.alibi_slopes is None,
        stock.logits_soft_cap,
        sinks_of(site) is None,
        (stock.num_heads, stock.num_kv_heads, stock.head_size, stock.scale),
    )


def sinks_of(site: LayerSite) -> Tensor | None:
    return getattr(site.stock, "sinks", None)


def own_builder(site: LayerSite, attn_groups: Any, vllm_config: VllmConfig) -> Any:
    """A metadata builder as the model runner has it for the layer, that no step of the engine uses."""
    (group,) = (group for group in chain(*attn_groups) if site.name in group.layer_names)
    theirs = group.get_metadata_builder()
    return type(theirs)(theirs.kv_cache_spec, theirs.layer_names, vllm_config, site.device)


def spans(site: LayerSite, vllm_config: VllmConfig) -> Iterator[tuple[int, int]]:
    """The first position of the queries that are compared, and the one behind them."""
    longest, settings = vllm_config.model_config.max_model_len, site.settings
    if site.role in (Role.WINDOW, Role.MEMORY):
        window = settings.temp_lora.window_tokens if settings.mode.adapts else settings.memory.windows.tokens
        longest = min(longest, window)
    geometry, block_size = site.geometry, site.layer.kv_cache.shape[2]
    chunk = min(CHUNK, vllm_config.scheduler_config.max_num_batched_tokens)
    n_local = geometry.n_local
    inside = min(INSIDE, n_local or longest, longest)
    yield inside - 1, inside
    crossing = min(2 * INSIDE if n_local is None else n_local + chunk // 2, longest)
    yield max(crossing - chunk, 0), crossing
    if n_local is not None:
        # All first tokens have left the window and look nearer than they are; it begins inside a block.
        beyond = max((geometry.distance_ceiling or 0) - n_local, 0) + geometry.n_global
        far = min(n_local + (beyond // block_size + 1) * block_size + block_size // 2, longest)
        if far > crossing:
            yield far - 1, far


class Text:
    """A text whose last tokens are queries, of which a few keys have all the weight.

    Among these `marked` keys are the first and the last that a query sees, and those beside them, which it
    does not see. So each of them counts, in windows of any size, and the others need not be in the reference.
    Queries are solved for the scores that they shall have, so that keys far away under ALiBi, a soft cap and
    sinks count, too.

    site: Of the layer that reads it.
    first, end: Positions of the queries, first .. end - 1.
    """

    def __init__(self, site: LayerSite, first: int, end: int, dtype: torch.dtype):
        self.site, self.first, self.end, self.dtype = site, first, end, dtype
        stock, self.geometry = site.stock, site.geometry
        self.heads, self.kv_heads, self.head_size = stock.num_heads, stock.num_kv_heads, stock.head_size
        self.soft_cap, self.scale = float(stock.logits_soft_cap or 0), float(stock.scale)
        self.sinks, self.slopes = None, None
        if (sinks := sinks_of(site)) is not None:
            self.sinks = sinks.detach().double().cpu()
        if stock.alibi_slopes is not None:
            self.slopes = torch.as_tensor(stock.alibi_slopes).double().cpu()
        self.rotary = on_the_cpu(site.rotary)
        self.random = torch.Generator().manual_seed(end)
        self.queries = torch.arange(first, end)
        self.marked = self._marked()
        # Long, so that queries need to have little of it.
        self.other = self._rounded(8 * self._normal(1, self.kv_heads, self.head_size), "_k_scale_float")
        self.keys, self.values = (
            self._rounded(self._normal(len(self.marked), self.kv_heads, self.head_size), name)
            for name in ("_k_scale_float", "_v_scale_float")
        )
        self.query = self._solved()

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as rotated at their positions, and values: [positions, kv_heads, head_size] of the dtype."""
        key = self.other.expand(len(positions), -1, -1).clone()
        nearer = self._nearer(self.queries[-1:], positions)[0]
        if nearer.any():
            key = self._rounded(self._turned(key, -nearer), "_k_scale_float")
        value = torch.full_like(key, 4.0)
        place = torch.searchsorted(self.marked, positions).clamp_max(len(self.marked) - 1)
        is_marked = self.marked[place] == positions
        key[is_marked], value[is_marked] = self.keys[place[is_marked]], self.values[place[is_marked]]
        return key.to(self.dtype), value.to(self.dtype)

    def error(self, output: Tensor) -> float:
        """Of what the layer has given, [queries, heads, head_size], as a share of the largest element."""
        positions = self.marked if self._is_rest_negligible() else torch.arange(self.end)
        key, value = self.at(positions)
        expected = reference.attention(
            self._unrotated(self.query, self.queries),
            self._unrotated(key, positions),
            value,
            branches(self.geometry, self.queries, positions),
            self.scale,
            self.rotary,
            self.slopes,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )
        return float((output.cpu().double() - expected).abs().max() / expected.abs().max())

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype] * (WITH_SOFT_CAP if self.soft_cap else 1)

    @property
    def columns(self) -> Tensor:
        """Of the block table, those that any of the queries reads."""
        block_size = self.site.layer.kv_cache.shape[2]
        start = int(self.geometry.window_start(self.queries[:1]))
        read = torch.cat((torch.arange(min(self.geometry.n_global, self.end)), torch.arange(start, self.end)))
        return (read // block_size).unique()

    def _marked(self) -> Tensor:
        """Ascending. At most half as many as a head has elements, so that queries can be solved for."""
        n_global, starts = self.geometry.n_global, self.geometry.window_start(self.queries)
        edges = [0, n_global - 1, n_global, *self.queries.tolist(), self.first - 1]
        edges += [int(start) + by for start in (starts[0], starts[-1]) for by in (-1, 0, 1)]
        marked = {position for position in edges if 0 <= position < self.end}
        seen = torch.cat(
            (torch.arange(min(n_global, self.end)), torch.arange(int(starts[0]), self.end))
        ).unique()
        for position in seen[torch.randperm(len(seen), generator=self.random)].tolist():
            if len(marked) >= min(MARKED, self.head_size // 2):
                break
            marked.add(position)
        return torch.tensor(sorted(marked))

    def _nearer(self, queries: Tensor, positions: Tensor) -> Tensor:
        """By how much keys are turned towards queries, [queries, positions]; of the first one behind those
        that may be, too.
        """
        start = self.geometry.window_start(queries)
        by = self.geometry.unseen_distance(queries, positions, start)
        return by * ((positions < start[:, None]) & (positions <= self.geometry.n_global))

    def _solved(self) -> Tensor:
        """Queries [queries, heads, head_size] with chosen scores."""
        level = torch.zeros(self.heads, dtype=torch.float64)
        if self.sinks is not None:
            level = self.sinks
        low = level - self._needed()
        if self.soft_cap:
            level, low = torch.full_like(level, self.soft_cap / 2), torch.full_like(level, -2 * self.soft_cap)
        rows = []
        for position in self.queries[:, None]:
            nearer = self._nearer(position, self.marked)[0]
            keys = torch.cat((self._turned(self.keys, nearer), self.other)).repeat_interleave(
                self.heads // self.kv_heads, 1
            )
            scores = level + self._normal(len(self.marked), self.heads)
            if self.slopes is not None:
                distance = position - self.marked - nearer
                scores = scores + (self.slopes * distance.clamp_min(0)[:, None]).clamp_max(20.0)
            wanted = torch.cat((scores, low[None])) / self.scale
            solved = torch.linalg.lstsq(keys.transpose(0, 1), wanted.T[..., None], driver="gelsd").solution
            rows.append(solved[..., 0])
        return torch.stack(rows).to(self.dtype)

    def _needed(self) -> float:
        """By how much the scores of unmarked keys are lower, so that together they have no weight."""
        return math.log(self.end) + 17.0

    def _is_rest_negligible(self) -> bool:
        """A small soft cap leaves no room for scores that are low enough."""
        return not self.soft_cap or self.soft_cap * (math.tanh(0.5) + math.tanh(2.0)) > self._needed()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def _rounded(self, x: Tensor, scale_name: str) -> Tensor:
        """To what the KV cache can hold."""
        if not is_quantized_kv_cache(self.site.stock.kv_cache_dtype):
            return x.to(self.dtype).double()
        scale = getattr(self.site.layer, scale_name)
        return (x / scale).to(current_platform.fp8_dtype()).double() * scale

    def _turned(self, x: Tensor, by: Tensor) -> Tensor:
        """x [positions, heads, head_size] turned on by `by` [positions], in float64."""
        if self.rotary is None:
            return x.double()
        angles = by[:, None, None] * self.rotary.inverse_frequencies.double()
        return self.rotary.rotate(x.double(), angles.cos(), angles.sin())

    def _unrotated(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self._turned(x, -positions)
        if self.rotary is not None:
            x[..., : self.rotary.rotary_dim] /= self.rotary.factor
        return x


def on_the_cpu(rotary: Rotary | None) -> Rotary | None:
    if rotary is None:
        return None
    frequencies = rotary.inverse_frequencies.cpu()
    return Rotary(rotary.head_size, rotary.rotary_dim, rotary.neox, frequencies, rotary.factor)


def attended(text: Text, builder: Any) -> Tensor:
    """What the layer gives for the queries of a text, [queries, heads, head_size].

    The text stands in blocks of the layer's KV cache from number 1 on, and they are cleared behind it.
    """
    site, columns = text.site, text.columns
    layer, cache, device = site.layer, site.layer.kv_cache, site.device
    impl: Any = layer.impl
    block_size = cache.shape[2]
    blocks = torch.arange(1, len(columns) + 1)
    table = torch.zeros(1, cdiv(text.end, block_size), dtype=torch.int32)
    table[0, columns] = blocks.int()

    def slots(positions: Tensor) -> Tensor:
        return (table[0, positions // block_size].long() * block_size + positions % block_size).to(device)

    def on_device(positions: Tensor) -> list[Tensor]:
        return [x.to(device) for x in text.at(positions)]

    try:
        cache.index_fill_(0, blocks.to(cache.device), 0)
        written = (columns[:, None] * block_size + torch.arange(block_size)).flatten()
        for positions in written[written < text.end].split(AT_ONCE):
            impl.do_kv_cache_update(layer, *on_device(positions), cache, slots(positions))
        count, starts = text.end - text.first, torch.tensor([0, text.end - text.first], dtype=torch.int32)
        metadata = builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor([text.end], dtype=torch.int32, device=device),
                num_reqs=1,
                num_actual_tokens=count,
                max_query_len=count,
                max_seq_len=text.end,
                block_table_tensor=table.to(device),
                slot_mapping=slots(text.queries),
                positions=text.queries.to(device),
            ),
        )
        query = text.query.to(device)
        output = torch.zeros_like(query)
        impl.forward(layer, query, *on_device(text.queries), cache, metadata, output)
        return output
    finally:
        cache.index_fill_(0, blocks.to(cache.device), 0)
