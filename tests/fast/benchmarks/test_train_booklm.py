"""The recipe of the shipped model, on a few tokens."""

import itertools
import pydoc_data.topics

import torch
import train_booklm


def test_tokenizer_and_batches_begin_with_bos() -> None:
    text = "\n".join(itertools.islice(pydoc_data.topics.topics.values(), 12))
    tokenizer = train_booklm.train_tokenizer([text])
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0 and tokenizer.decode(ids[1:]) == text
    books = [torch.tensor(ids[1:]).repeat(20)]
    batch = next(train_booklm.batches(books, torch.Generator().manual_seed(0)))
    assert batch.shape == (train_booklm.BATCH, train_booklm.CONTEXT + 1)
    assert (batch[:, 0] == 0).all() and (batch[:, 1:] != 0).any()


def test_the_sink_loss_teaches_heads_to_rest_on_bos() -> None:
    model = train_booklm.new_model(vocab_size=64)
    ids = torch.randint(2, 64, (2, 33))
    ids[:, 0] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = None
    for _ in range(3):
        nll, sink = train_booklm.losses(model, ids, with_sink=True)
        before = sink.item() if before is None else before
        sink.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nll.isfinite() and sink.item() < before
    assert train_booklm.losses(model, ids, with_sink=False)[1] == 0
