"""The text of long outputs, in time per token that does not depend on how much was written.

vLLM's detokenizers append each token to one string, which copies all that was written before. Here a
detokenizer keeps the end of its text only. What stands before is set apart, and put back where somebody asks
for the whole text.
"""

import functools

from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

# An attribute that is added to a detokenizer: the text before its output_text, in pieces.
BEFORE = "longctx_before"
MOST = 1 << 13  # characters of output_text, which longer stop strings may exceed


def keep_ends_of_texts() -> None:
    """From now on, this process's detokenizers keep the end of their text only."""
    update, get_next_output_text = (
        BaseIncrementalDetokenizer.update,
        BaseIncrementalDetokenizer.get_next_output_text,
    )
    if hasattr(update, "__wrapped__"):
        return

    @functools.wraps(update)
    def update_end(
        self: BaseIncrementalDetokenizer, new_token_ids: list[int], stop_terminated: bool
    ) -> str | None:
        if len(self.output_text) > MOST:
            set_apart(self)
        return update(self, new_token_ids, stop_terminated)

    @functools.wraps(get_next_output_text)
    def get(self: BaseIncrementalDetokenizer, finished: bool, delta: bool) -> str:
        if before := vars(self).get(BEFORE):
            if delta and self._last_output_text_offset >= 0:
                before.clear()  # it was given out
            else:
                put_back(self, before)
        return get_next_output_text(self, finished, delta)

    BaseIncrementalDetokenizer.update = update_end  # type: ignore[method-assign]  # a seam
    BaseIncrementalDetokenizer.get_next_output_text = get  # type: ignore[method-assign]  # a seam


def set_apart(detokenizer: BaseIncrementalDetokenizer) -> None:
    """Set apart all that no stop string which is still to come can begin in."""
    longest = max(map(len, detokenizer.stop), default=0)
    cut = len(detokenizer.output_text) - longest
    if cut > MOST // 2:  # else it would cost more than it saves
        vars(detokenizer).setdefault(BEFORE, []).append(detokenizer.output_text[:cut])
        detokenizer.output_text = detokenizer.output_text[cut:]
        detokenizer._last_output_text_offset -= cut


def put_back(detokenizer: BaseIncrementalDetokenizer, before: list[str]) -> None:
    end = detokenizer.output_text
    detokenizer.output_text = "".join([*before, end])
    detokenizer._last_output_text_offset += len(detokenizer.output_text) - len(end)
    before.clear()
