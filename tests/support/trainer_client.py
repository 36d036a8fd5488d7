"""What a trainer process reports."""

import time

from vllm_longctx.temp_lora.client import TrainerClient

TIMEOUT_S = 120  # a start takes a few seconds on an idle machine


def hear(client: TrainerClient, *kinds: type) -> list:
    """All reports up to the first of one of the kinds."""
    reports, end = [], time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        client.wait(0.05)
        for report in client.poll():
            reports.append(report)
            if isinstance(report, kinds):
                return reports
    raise AssertionError(f"none of {kinds} in {reports}")
