"""benchmarks/perplexity.py: which ways it reads in, what it averages, and how it goes on."""

from pathlib import Path

import pytest
from perplexity import ALL, FRESH, buckets_by_way, chosen_ways, read_before, with_mean

from vllm_longctx.cli.engine import METHODS
from vllm_longctx.cli.output import write_json
from vllm_longctx.cli.score import Bucket

ABOUT = {"model": "booklm", "dtype": "float32"}


def test_windows_are_further_ways() -> None:
    ways = chosen_ways(f"{FRESH},plain", "256,512")
    assert ways == {
        FRESH: None,
        "plain": METHODS["plain"],
        "lm-infinite 512": {"preset": "lm-infinite", "attention": {"n_local": 512}},
        "lm-infinite 256": {"preset": "lm-infinite", "attention": {"n_local": 256}},
    }
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        chosen_ways("fast", None)


def test_texts_are_averaged_where_all_of_them_are() -> None:
    rows = buckets_by_way({"plain": {"a": [1.0] * 255 + [2.0] * 256, "b": [3.0] * 255 + [4.0] * 100}})[
        "plain"
    ]
    assert [(b.start, b.end, b.nll) for b in rows["b"]] == [(0, 256, 3.0), (256, 356, 4.0)]
    assert [(b.start, b.end, b.nll) for b in rows[ALL]] == [(0, 256, 2.0)]


def test_a_run_goes_on_with_what_its_file_has(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert read_before(None, ABOUT) == read_before(path, ABOUT) == {}
    rows = with_mean({"a": [Bucket(0, 256, 1.5)]})
    nll = {"plain": {name: [vars(b) for b in some] for name, some in rows.items()}}
    write_json(path, {**ABOUT, "nll": nll})
    assert read_before(path, ABOUT) == {"plain": {"a": [Bucket(0, 256, 1.5)]}}
    with pytest.raises(ValueError, match=r"was made with .*'dtype': 'float32'.*: give another file"):
        read_before(path, {**ABOUT, "dtype": "bfloat16"})
