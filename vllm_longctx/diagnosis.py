"""Why a model breaks past its trained length, and what Λ attention has to mend.

LM-Infinite (arXiv 2308.16137, section 3) names three things that a model never met in training:

1. unseen distances: attention logits there may be larger than any before, or the wrong keys' are;
2. an unseen number of tokens: the more keys share the attention, the larger its entropy;
3. the first tokens: their hidden states stand apart from all others, as if they had a position of their own.
   Attention leans on them, and a window without them loses them.

transformers' own model computes the text twice, layer by layer, with plain attention and with Λ attention.
Of both, some queries are looked at: `--samples` in each doubling of their position, evenly spread. So what is
measured costs time in proportion to the text, and memory, too. Plain attention itself is quadratic.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_longctx.geometry import Geometry, branches
from vllm_longctx.rotary import Rotary, no_turn, rotation_between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = Geometry()
OURS = "longctx_diagnose"  # the name of our attention in transformers' registry
CHUNK = 512  # queries that attend at once
DOUBLINGS = 6  # buckets inside the trained length, besides the first
FIRST = 64  # tokens at the beginning whose share of the attention is measured one by one
STATES = 4  # layers whose hidden states are compared
PROBED = 16  # tokens, to see how the model rotates
MOVING = ("dynamic", "longrope")  # rescalings whose frequencies depend on the length of the text

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What the words of the diagnosis mean.
RISE = 1.0  # nats by which a logit has to be above all those of trained distances
GROWTH = 0.5  # nats by which an entropy has to be above all those of trained positions
SHARE = 0.1  # of the heads
APART = 2.0  # times as far from the centre as later tokens are
LOST = 0.01  # of the attention, which a model may miss
KEPT = 0.9  # of the attention that the first tokens get inside the trained length


@dataclass(frozen=True)
class Samples:
    """The queries that are looked at.

    edges: of buckets, in tokens, from 0: they double, and the trained length is one of them. Distances fall
        into the same buckets.
    positions: of each bucket.
    trained: buckets that lie inside of the trained length.
    """

    edges: list[int]
    positions: list[list[int]]
    trained: int

    @classmethod
    def of(cls, trained: int, tokens: int, each: int) -> "Samples":
        inside = [e for k in range(DOUBLINGS, -1, -1) if (e := trained >> k)]
        beyond = [e for k in range(1, 64) if (e := trained << k) < tokens]
        edges = sorted({0, *inside, *beyond, tokens})
        positions = [
            sorted({a + (2 * k + 1) * (b - a) // (2 * each) for k in range(each)}) for a, b in pairwise(edges)
        ]
        return cls(edges, positions, edges.index(trained))

    @property
    def first(self) -> int:
        """Tokens at the beginning that are looked at one by one."""
        return max(1, min(FIRST, self.edges[self.trained] // 8))

    @property
    def compared(self) -> list[int]:
        """Positions whose hidden states are compared."""
        return sorted({*range(self.first), *(p for some in self.positions for p in some)})

    @property
    def ceilings(self) -> list[int]:
        """Distances at which the first tokens are tried, in tokens."""
        return [edge for edge in self.edges if 8 * edge >= self.edges[self.trained]]


@dataclass(frozen=True)
class Measured:
    """What one way of attending has shown.

    logits: [layers, heads, buckets], the largest by distance in the text, -inf where no key is seen.
    entropies: [layers, heads, buckets], the largest of a bucket's queries, in nats.
    first: [buckets, first tokens], the share of attention on each, mean over queries and heads.
    at_ceilings: [ceilings], the share on all n_global first tokens if they looked that far away; NaN of
        plain attention.
    states: [STATES, positions, hidden size], what the first layers return.
    """

    logits: Tensor
    entropies: Tensor
    first: Tensor
    at_ceilings: Tensor
    states: Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, rotary: Rotary, scale: float
) -> Tensor:
    """Attention of a whole text: [heads, tokens, head_size] of queries' dtype.

    query [heads, tokens, d], key, value [kv_heads, tokens, d]: rotated at positions 0, 1, ...

    A key whose distance is capped has a score of its own, of the query as at the ceiling and the key as at 0.
    Both scores come out of one product if heads are twice as wide: a key's elements stand in one half.
    """
    group = len(query) // len(key)
    key, value = (x.repeat_interleave(group, 0) for x in (key, value))
    tokens = query.shape[1]
    if geometry == PLAIN:
        return attended(query, key, value, scale, is_causal=True)
    count, capped, raw = min(geometry.n_global, tokens), *at_ceiling(query, key, geometry, rotary)
    n_local = geometry.n_local or tokens
    pieces = []
    for begin in range(0, tokens, CHUNK):
        queries = torch.arange(begin, min(begin + CHUNK, tokens))
        since = max(0, begin - n_local + 1)
        keys = torch.arange(since, len(queries) + begin)
        local, far, near = visible(geometry, queries, torch.cat((torch.arange(count), keys)))
        near_keys = torch.cat((key[:, :count], key[:, since : begin + len(queries)]), 1)
        mask = torch.cat((far[:, :count], near[:, :count], local[:, count:]), 1)
        wide_keys = torch.cat((doubled(raw, second=True), doubled(near_keys)), 1)
        values = torch.cat((value[:, :count], value[:, :count], value[:, since : begin + len(queries)]), 1)
        wide_query = torch.cat((query[:, queries], capped[:, queries]), -1)
        output = attended(wide_query, wide_keys, doubled(values), scale, attn_mask=mask)
        pieces.append(output[..., : query.shape[-1]])
    return torch.cat(pieces, 1)


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float, **seen: Any) -> Tensor:
    """torch's, [heads, tokens, d], in a shape whose memory is linear in the tokens."""
    some = nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], scale=scale, **seen
    )
    return some[0]


def doubled(x: Tensor, second: bool = False) -> Tensor:
    """x in the first half of heads twice as wide, or in the second; the other is zero."""
    return nn.functional.pad(x, (x.shape[-1], 0) if second else (0, x.shape[-1]))


def at_ceiling(
    query: Tensor, key: Tensor, geometry: Geometry, rotary: Rotary, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries as at the distance ceiling, and the first keys as at position 0: their products are capped
    scores.

    positions: of the queries, by default 0, 1, ...
    """
    positions = torch.arange(query.shape[1]) if positions is None else positions
    first = key[:, : geometry.n_global]
    ceiling = geometry.distance_ceiling or 0
    return rotary.turn(query, ceiling - positions), rotary.turn(first, -torch.arange(first.shape[1]))


def visible(geometry: Geometry, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bool [queries, keys]: keys of the window, first keys at the ceiling, and ones at their own distance."""
    local, first = branches(geometry, queries, keys)
    capped = first.distance < queries[:, None] - keys
    return local.visible, first.visible & capped, first.visible & ~capped


def logits(
    query: Tensor, key: Tensor, positions: Tensor, geometry: Geometry, rotary: Rotary, scale: float
) -> Tensor:
    """float32 [heads, queries, tokens], -inf where the query does not see the key.

    query: [heads, queries, d], of the positions. key: [heads, tokens, d]. Both rotated at their positions.
    """
    query, key = query.float(), key.float()
    local, far, near = visible(geometry, positions, torch.arange(key.shape[1]))
    scores = query @ key.transpose(1, 2) * scale
    if count := min(geometry.n_global, key.shape[1]):
        capped, raw = at_ceiling(query, key, geometry, rotary, positions)
        scores[..., :count] = torch.where(
            far[:, :count], capped @ raw.transpose(1, 2) * scale, scores[..., :count]
        )
    return scores.masked_fill(~(local | far | near), -torch.inf)


def largest_by_distance(scores: Tensor, positions: Sequence[int], edges: Sequence[int]) -> Tensor:
    """[heads, buckets] of logits [heads, queries, tokens]; -inf where there is no key."""
    found = scores.new_full((len(scores), len(edges) - 1), -torch.inf)
    for row, position in enumerate(positions):
        for bucket, (near, far) in enumerate(pairwise(edges)):
            keys = scores[:, row, max(position - far + 1, 0) : max(position - near + 1, 0)]
            if keys.shape[1]:
                found[:, bucket] = torch.maximum(found[:, bucket], keys.amax(-1))
    return found


class Diagnosis:
    """A model of transformers', and how it attends to a text: it computes the text in both ways.

    samples: whose queries are measured. geometry: of Λ attention, with a ceiling.
    """

    def __init__(self, model: "PreTrainedModel", samples: Samples, geometry: Geometry) -> None:
        self.model, self.samples, self.geometry = model, samples, geometry
        self.attend: Callable[..., Tensor]
        self.modules = attention_modules(model)
        for module in self.modules:
            module.longctx_diagnosis = self  # type: ignore[assignment]  # where our attention finds it
        self.rotaries = self.rotations()

    def rotations(self) -> list[Rotary]:
        """Of each layer, found by computing a few tokens at two places, as an engine does.

        Raises ValueError where a layer's queries and keys are turned in no way that is known.
        """
        (rotary,) = rotary_modules(self.model)
        outputs: dict[int, Tensor] = {}

        def at(start: int) -> list[tuple[Tensor, Tensor]]:
            given = []

            def take(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
                given.append((query.transpose(0, 1), key.transpose(0, 1)))
                if layer not in outputs:
                    outputs[layer] = attention(query, key, value, PLAIN, no_turn(2), scale)
                return outputs[layer]  # the same at both places, so that all inputs of layers are

            self.attend = take
            positions = torch.arange(start, start + PROBED)[None]
            ids = torch.arange(PROBED)[None] % self.model.config.vocab_size
            self.model(input_ids=ids, position_ids=positions, use_cache=False)
            return given

        here, there = at(0), at(PROBED)
        size = here[0][0].shape[-1]
        frequencies = rotary.inv_freq.double()
        candidates = [Rotary(size, 2 * len(frequencies), neox, frequencies) for neox in (True, False)]
        tolerance = max(1e-4, 8 * torch.finfo(self.model.dtype).eps)
        found = []
        for layer, (a, b) in enumerate(zip(here, there, strict=True)):
            turned = rotation_between(a, b, PROBED, (no_turn(size), *candidates), tolerance)
            if turned is None:
                raise ValueError(f"diagnose does not know how layer {layer} of this model encodes positions")
            found.append(turned)
        return found

    def measure(self, tokens: list[int], geometry: Geometry, each_layer: Callable[[], None]) -> Measured:
        """Computes the text in one way. each_layer is called when a layer has attended."""
        rows: list[tuple[Tensor, ...]] = []
        states: list[Tensor] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            rows.append(self.look(layer, query, key, geometry, scale))
            output = attention(query, key, value, geometry, self.rotaries[layer], scale)
            each_layer()
            return output

        def keep_states(module: nn.Module, _: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            states.append(hidden[0, self.samples.compared].float())

        self.attend = attend
        first_layers: Any = self.model.layers
        handles = [layer.register_forward_hook(keep_states) for layer in first_layers[:STATES]]
        try:
            self.model(input_ids=torch.tensor([tokens]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        largest, entropies, first, at_ceilings = (torch.stack(some) for some in zip(*rows, strict=True))
        return Measured(largest, entropies, first.mean(0), at_ceilings.mean(0), torch.stack(states))

    def look(
        self, layer: int, query: Tensor, key: Tensor, geometry: Geometry, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A layer's part of the first four of `Measured`, in their order."""
        key = key.repeat_interleave(len(query) // len(key), 0)
        largest, entropies, first = [], [], []
        at_ceilings = [query.new_full((len(self.samples.ceilings),), torch.nan)]
        for bucket, some in enumerate(self.samples.positions):
            positions = torch.tensor(some)
            queries = query[:, positions]
            scores = logits(queries, key, positions, geometry, self.rotaries[layer], scale)
            largest.append(largest_by_distance(scores, some, self.samples.edges))
            shares = scores.softmax(-1)
            entropies.append(torch.special.entr(shares).sum(-1).amax(1))
            first.append(shares[..., : self.samples.first].mean((0, 1)))
            if geometry != PLAIN and bucket >= self.samples.trained:
                at_ceilings.append(self.shares_at_ceilings(scores, queries, key, positions, layer, scale))
        return (
            torch.stack(largest).amax(0),
            torch.stack(entropies, 1),
            torch.stack(first),
            torch.stack(at_ceilings).nanmean(0),
        )

    def shares_at_ceilings(
        self, scores: Tensor, query: Tensor, key: Tensor, positions: Tensor, layer: int, scale: float
    ) -> Tensor:
        """[ceilings]: the first tokens' share of the attention, mean over heads and queries, if all of them
        looked that far away.
        """
        count, rotary = self.geometry.n_global, self.rotaries[layer]
        others = scores[..., count:].logsumexp(-1)
        raw = rotary.turn(key[:, :count].float(), -torch.arange(count)).transpose(1, 2)
        shares = []
        for ceiling in self.samples.ceilings:
            first = (rotary.turn(query.float(), ceiling - positions) @ raw * scale).logsumexp(-1)
            shares.append((first - others).sigmoid().mean())
        return torch.stack(shares)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def rotary_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "inv_freq")]


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **own: Any,
) -> tuple[Tensor, None]:
    """As transformers calls a function of its attention interface. Raises ValueError for a layer whose
    attention is another one: with a window of its own, a cap of logits, or sinks.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if own.get(name) is not None:
            raise ValueError(
                f"layer {module.layer_idx} of this model attends with {name}, which diagnose does not compute"
            )
    output = module.longctx_diagnosis.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


def loaded(path: str, dtype: str) -> "PreTrainedModel":
    """transformers' model, without its head, whose attention is ours.

    Raises ValueError for one that does not have what is measured.
    """
    from transformers import AttentionInterface, AutoModel

    AttentionInterface.register(OURS, _interface)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    model = AutoModel.from_pretrained(path, dtype=dtype)
    rotaries = rotary_modules(model)
    if len(rotaries) != 1 or not hasattr(model, "layers"):
        raise ValueError(
            f"{type(model).__name__} has no list of layers with one rotary embedding for all of them, which "
            "diagnose needs"
        )
    if (kind := getattr(rotaries[0], "rope_type", "default")) in MOVING:
        raise ValueError(
            f"the rope_type is {kind!r}, whose frequencies change as a text grows; diagnose needs fixed ones"
        )
    model.set_attn_implementation(OURS)
    return model.eval()


@dataclass(frozen=True)
class Factor:
    """One of the three, in figures and words. holds: for this model."""

    name: str
    holds: bool
    words: str


@dataclass(frozen=True)
class Findings:
    """What the figures say.

    factors: the three. n_global, distance_ceiling: recommended, in tokens. lost: of the attention inside the
    trained length, by how many first tokens a window keeps. shares_at_ceilings: of the first tokens past it,
    by ceiling.
    """

    factors: list[Factor]
    n_global: int
    distance_ceiling: int
    lost: dict[int, float]
    shares_at_ceilings: dict[int, float]


def share_above(values: Tensor, begin: int, end: int, by: float) -> float:
    """The share of heads whose value in buckets begin .. end - 1 is more than `by` above all before.

    values: [layers, heads, buckets].
    """
    before, later = values[..., :begin].amax(-1), values[..., begin:end].amax(-1)
    return float((later > before + by).float().mean())


def apart(states: Tensor, samples: Samples) -> Tensor:
    """[first tokens]: how far their states are from the centre of later ones, which are 1 away on average.

    states: [positions, hidden size] of a layer. The mean is a root of a mean square.
    """
    trained = samples.edges[samples.trained]
    later = states[[row for row, p in enumerate(samples.compared) if samples.first <= p < trained]]
    centre = later.mean(0)
    spread = (later - centre).square().sum(-1).mean().sqrt()
    return (states[: samples.first] - centre).norm(dim=-1) / spread


def lost_without(first: Sequence[float]) -> dict[int, float]:
    """The attention that a window loses, by how many of the first tokens it keeps.

    first: the share that each of them gets. What any token gets, as the later half of them does, is no loss.
    """
    ordinary = statistics.fmean(first[len(first) // 2 :])
    return {
        kept: sum(max(share - ordinary, 0.0) for share in first[kept : len(first) // 2])
        for kept in range(len(first) // 2 + 1)
    }


def findings(plain: Measured, ours: Measured, samples: Samples, n_global: int) -> Findings:
    """What the figures say; the thresholds stand at the top of this file. n_global: of Λ attention."""
    trained, last, end = samples.edges[samples.trained], samples.trained - 1, len(samples.edges) - 1
    half = samples.edges[last]

    def rising(values: Tensor, other: Tensor, by: float) -> tuple[float, str]:
        past, before, with_ours = (
            share_above(values, samples.trained, end, by),
            share_above(values, last, samples.trained, by),
            share_above(other, samples.trained, end, by),
        )
        return (
            past,
            f"{past:.0%} of the heads ({before:.0%} from {half:,} to {trained:,}; with Λ {with_ours:.0%})",
        )

    logits_rise, logit_words = rising(plain.logits, ours.logits, RISE)
    entropies_rise, entropy_words = rising(plain.entropies, ours.entropies, GROWTH)
    entropy, our_entropy = means(plain.entropies), means(ours.entropies)
    first = plain.first[last].tolist()
    lost = lost_without(first)
    needed = next(kept for kept, share in lost.items() if share <= LOST)
    standing = torch.stack([apart(states, samples) for states in plain.states]).amax(0)
    shares = dict(zip(samples.ceilings, ours.at_ceilings.tolist(), strict=True))
    usual = sum(first[:n_global])
    good = [c for c, share in shares.items() if c <= trained and share >= KEPT * usual]
    factors = [
        Factor(
            "unseen distances",
            logits_rise >= SHARE,
            f"past {trained:,} tokens the largest logit is more than {RISE:g} above all those of shorter "
            f"distances in {logit_words}",
        ),
        Factor(
            "number of tokens",
            entropies_rise >= SHARE,
            f"past {trained:,} tokens the largest entropy is more than {GROWTH:g} nats above all before in "
            f"{entropy_words}; its mean over heads is {entropy[last]:.2f} nats from {half:,} to {trained:,} "
            f"tokens, {entropy[-1]:.2f} at the end of the text, and there {our_entropy[-1]:.2f} with Λ",
        ),
        Factor(
            "first tokens",
            needed > 0,
            f"of the attention of queries from {half:,} to {trained:,} they get {lost[0]:.0%} more than as "
            f"many others, the very first one {lost[0] - lost[1]:.0%}; in the first layers the states of "
            f"{int((standing > APART).sum())} of {len(first)} are more than {APART:g} times as far from the "
            f"centre as those of later tokens, at most {float(standing.max()):.1f} times",
        ),
    ]
    return Findings(factors, needed, max(good, default=trained), lost, shares)


def means(values: Tensor) -> list[float]:
    """By bucket, over all layers and heads that have a value there; NaN where none has.

    values: [layers, heads, buckets].
    """
    return values.where(values.isfinite(), torch.nan).nanmean((0, 1)).tolist()


def components(states: Tensor) -> Callable[[Tensor], Tensor]:
    """Projects states [n, hidden size] on the two principal components of these ones: [n, 2]."""
    centre = states.mean(0)
    _, _, directions = torch.linalg.svd(states - centre, full_matrices=False)
    return lambda some: (some - centre) @ directions[:2].T
