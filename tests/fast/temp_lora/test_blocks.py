"""Blocks, versions and windows of Temp-LoRA against their definitions, position by position."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_longctx.temp_lora.blocks import Blocks, Window, example

blocks = st.builds(Blocks, st.integers(0, 50), st.integers(1, 40), st.sampled_from(["cascaded", "parallel"]))


@given(blocks, st.integers(0, 400))
def test_a_position_belongs_to_one_block_and_its_target_is_the_next_token(b: Blocks, position: int) -> None:
    block = b.block_of(position)
    if position < b.origin:
        assert block == 0
    else:
        assert position + 1 in b.targets(block)
        assert position < b.end_of_block(position) == b.targets(block).stop - 1


@given(blocks, st.integers(0, 400))
def test_no_position_is_computed_by_a_version_that_saw_its_target(b: Blocks, position: int) -> None:
    version = b.version_of(position)
    assert version == 0 or b.targets(version).stop <= position + 1
    behind = 1 if b.update_mode == "cascaded" else 2
    assert version == max(b.block_of(position) - behind, 0)


@given(
    st.integers(1, 300), st.integers(1, 40), st.sampled_from(["cascaded", "parallel"]), st.integers(0, 400)
)
def test_who_learns_from_the_prompt_only_has_the_versions_of_whole_blocks_of_it(
    prompt: int, block_tokens: int, mode: str, position: int
) -> None:
    everything, read = (Blocks.of_prompt(prompt, block_tokens, mode, learn) for learn in ("all", "prompt"))  # type: ignore[arg-type]
    last = read.last_version
    assert last is not None
    assert read.targets(last).stop <= prompt < read.targets(last + 1).stop
    assert read.version_of(position) == min(everything.version_of(position), last)
    if everything.version_of(position) <= last:
        assert read.renews(position) == everything.renews(position)
    else:
        assert not read.renews(position)


walks = given(
    st.sampled_from(["reuse", "recompute"]),
    st.integers(1, 100),
    st.integers(0, 32),
    st.integers(1, 64),
    st.integers(1, 600),
)


def smallest_window(policy: str, context: int, keep_first: int) -> Window:
    """That the context and the first tokens leave a KV block of room in."""
    return Window(policy, context + 32 + keep_first, context, keep_first, 32)  # type: ignore[arg-type]


@walks
def test_passes_are_those_that_a_walk_finds(
    policy: str, context: int, keep_first: int, block_tokens: int, end: int
) -> None:
    window = smallest_window(policy, context, keep_first)
    b, start, found = Blocks(0, block_tokens, "cascaded"), 0, []
    for position in range(end):
        if (new := window.next_start(start, position, b)) is not None:
            start = new
            found.append((position, new, b.version_of(position)))
    assert [(p.position, p.start, p.version) for p in window.passes(b, end)] == found


@given(blocks, st.integers(1, 400))
def test_versions_change_where_blocks_begin(b: Blocks, position: int) -> None:
    if b.version_of(position) != b.version_of(position - 1):
        assert b.starts_block(position)


@walks
def test_no_query_sees_more_than_the_window(
    policy: str, context: int, keep_first: int, block_tokens: int, text: int
) -> None:
    """Walked as the scheduler does: every pass makes room, and keeps at least the context."""
    window = smallest_window(policy, context, keep_first)
    b, start = Blocks(0, block_tokens, "cascaded"), 0
    for position in range(text):
        new = window.next_start(start, position, b)
        if new is not None:
            assert new % 32 == 0 and position - new >= min(context, position)
            start = new
        assert window.live_tokens(start, position) < window.window_tokens
        assert position < window.last_position(start)
        assert 0 <= window.first_computed(start) <= start


def test_an_example_has_the_context_before_its_first_target() -> None:
    text = [1, *range(100, 140)]
    assert example(text, range(20, 30), 5, bos=1) == [1, *text[15:30]]
    assert example(text, range(3, 8), 5, bos=1) == text[0:8]
    assert example(text, range(20, 30), 5, bos=2) == text[15:30]
    assert example(text, range(20, 30), 5, bos=None) == text[15:30]
