"""The arithmetic of a device's memory, against sums done by hand."""

from dataclasses import replace

import pytest

from posttrain.planning.memory import NF4_BYTES, Held, LayerBytes, OutsideBytes, Run, cache_bytes, peak, sharing, total

LAYERS = [LayerBytes(count=10, kept=100, copies=20, output=7, forward=5, backward=30)]
OUTSIDE = OutsideBytes(kept=40, forward=90, head=150, pending=60, end=80)
"""Ten layers; numbers chosen so that each part of a sum can be told in it."""
HELD = Held(
    parameters=4_000,
    trained=1_000,
    beside=100,
    layer=90,
    layer_bytes=360,
    layer_trained=90,
    outside=100,
    outside_bytes=400,
)
RUN = Run(HELD, sharing("single", 1, 2), 8.0, LAYERS, OUTSIDE, accumulates=True, checkpointing=False)


def sums(run: Run) -> dict[str, int]:
    return {name: total(moment) for name, moment in run.moments().items()}


def test_full_training() -> None:
    """4,000 of weights and 8,000 of averages always; 4,000 of gradients; ten layers keep 1,000 and 200 of copies."""
    found = sums(RUN)
    assert found["forward"] == 4_000 + 8_000 + 4_000 + 1_000 + 200 + 90
    assert (
        found["backward"] == 16_000 + 1_200 + 150
    )  # the output layer's: 1,350 - against 1,200 + 30 + 60, and 80 at the end
    assert found["update"] == 16_000
    assert peak(RUN.moments()) == ("backward", 17_350)


def test_one_micro_batch_has_no_gradients_until_its_end() -> None:
    run = replace(RUN, accumulates=False)
    assert sums(run)["forward"] == 12_000 + 1_200 + 90
    assert sums(run)["backward"] == 12_000 + 4_000 - 400 + 80  # 400 of those are in what was seen at the end
    assert (
        sums(replace(run, share=sharing("ddp", 2, 2)))["forward"] == 16_000 + 1_200 + 90
    )  # a bucket is never given back
    assert sums(replace(run, share=sharing("ddp", 1, 2)))["forward"] == 12_000 + 1_200 + 90


def test_checkpointing_keeps_outputs_and_one_layer() -> None:
    """Autocast's copies of all layers last as long as the forward pass; in backward only those of the layer at hand."""
    found = sums(replace(RUN, checkpointing=True))
    assert found["forward"] == 16_000 + 10 * 7 + 200 + 90
    assert found["backward"] == 16_000 + 10 * 7 + (100 + 20) + 30 + 60


def test_sharded_over_four() -> None:
    """A quarter of weights, gradients and averages; two whole layers come together in 2 bytes, the rest in 4."""
    gathered = 2 * 90 * 2 + 100 * 4
    found = sums(
        replace(RUN, share=sharing("fsdp", 4, 2), compute=2, frozen=(("reference", 4_000), ("reward model", 700)))
    )
    # the reference in parts, the reward model whole
    assert found["forward"] == 4_000 + 700 + 1_000 + 1_000 + 90 + gathered  # no copies: the gathered weights are those
    # a layer's gradients in 2 and in 4 bytes, 100 trained numbers outside in 4; the output layer's 150
    assert found["backward"] == 5_700 + 1_000 + 150 + gathered + 6 * 90 + 4 * 100
    assert found["update"] == 4_000 + 700 + 1_000
    held = replace(HELD, numbers=1_000)
    writing = replace(RUN, held=held, share=sharing("fsdp", 4, 2), compute=2, cache=10)
    assert sums(writing)["sampling"] == 1_000 + 2_000 + 10 + 2_000  # all 1,000 numbers come together
    assert sums(replace(RUN, share=sharing("fsdp", 4, 2, host=True)))["update"] == 0
    late = replace(RUN, share=sharing("fsdp", 4, 2, gloo=True), compute=2)
    assert sums(late)["forward"] == 4_000 + 1_000 + 90 + gathered + 400  # what is outside, once more


def test_zero_over_four() -> None:
    """1,000 trained numbers: their copies and averages take 12 bytes, in parts; 25 million numbers of gradients come together."""
    buckets, beside = 100_000_000, (("reference", 4_000),)
    whole = replace(RUN, frozen=beside, share=sharing("deepspeed", 4, zero_stage=2))
    assert sums(whole)["update"] == 4_000 + 4_000 + 1_000 + 3_000 + buckets
    parts = replace(RUN, frozen=beside, share=sharing("deepspeed", 4, zero_stage=3), scoring=70)
    assert sums(parts)["update"] == 1_000 + 4_000 + 1_000 + 3_000 + buckets  # the reference is whole
    assert sums(parts)["start"] == 4_000 + 70
    # what is outside, 400, and of the layers a bucket or, as here, all: 4,000 - 400 - 360
    assert sums(parts)["forward"] == 1_000 + 4_000 + 1_000 + 3_000 + buckets + 1_000 + 90 + 3_240 + 400
    writing = replace(RUN, share=sharing("deepspeed", 4, zero_stage=3), compute=2, cache=10)
    assert sums(writing)["sampling"] == 1_000 + buckets + 3_000 + 10 + 4_000  # all weights, in 4 bytes
    offloaded = replace(RUN, share=sharing("deepspeed", 4, zero_stage=3, host=True))
    assert sums(offloaded)["update"] == 1_000 + buckets  # weights stay on the device


def test_sampling() -> None:
    """No gradients lie there between iterations."""
    run = replace(RUN, frozen=(("reference", 4_000), ("reward model", 500)), cache=2_000, sampling=300, scoring=70)
    assert sums(run)["sampling"] == 12_000 + 4_500 + 2_300
    assert sums(run)["evaluation"] == 12_000 + 4_500 + 70


def test_cache_and_nf4() -> None:
    """30 layers, 3 heads of 64, 2 bytes: 2·30·3·64·2 a token, and once more of one layer while it grows."""
    assert cache_bytes(1_000, [(30, 2 * 3 * 64 * 2)]) == 31 * 2 * 3 * 64 * 2 * 1_000
    assert pytest.approx(4.127, abs=1e-3) == 8 * NF4_BYTES  # arXiv:2305.14314, sec. 3: .127 bits a parameter


def test_an_adapted_layer_is_gathered_as_it_is_held() -> None:
    """90 numbers, of which 80 take 40 bytes in all and 10 train in fp32: 80 bytes, less than 2 bytes each."""
    held = replace(HELD, layer_bytes=80, layer_trained=10, beside=0, outside_bytes=200)
    found = sums(replace(RUN, held=held, share=sharing("fsdp", 4, 2), compute=2))
    assert found["forward"] == 4_000 + 1_000 + 90 + 2 * 80 + 200
    assert found["backward"] == 4_000 + 1_000 + 150 + 2 * 80 + 200 + 6 * 10
