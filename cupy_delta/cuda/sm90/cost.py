"""How the walks of compute capability 9.0 are divided: the choice of the least predicted time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from ...call import Call
from ..spec import DeviceFacts
from .tiles import BOX, CHUNK, slices_of, transfer_cluster, transfer_slices

# Microseconds on an H100 of one more launch, of a second stream, and of a walk for every segment
# that it joins.
LAUNCH, CONCURRENT, JOIN = 4.0, 3.0, 1.5
SEGMENTS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
BANDWIDTH = 3.65e6  # bytes per microsecond


class Rates(NamedTuple):
    """Microseconds per chunk, by tiles of 64 value channels per block.

    Of a walk on all multiprocessors, and of a transfer. Where walks may run beside transfers or be
    given X by them: of a walk beside transfers, and of one with one tile that is given X. Where it
    is looked where segments may begin from zero, `looks` for that.
    """

    walk: dict[int, float]
    transfer: dict[int, float]
    concurrent_walk: dict[int, float] | None = None
    given_walk: float = 0.0
    looks: float = 0.0


# Measured on an H100. With a gate all of them take about a fifth longer, so the choice is the same.
FORWARD = Rates({1: 1.66, 2: 2.4}, {1: 1.25, 2: 1.46}, {1: 1.54, 2: 2.4}, 1.27)
# Of walks with a gate per head, on an H200: to compare late ones with others alone.
GATED = Rates({1: 1.72, 2: 2.65}, {1: 1.44, 2: 1.6}, {1: 1.7, 2: 2.65}, 1.45)
# Measured on an H200.
TRAINING = Rates({1: 1.7, 2: 2.55}, {1: 1.38, 2: 1.9})
# With a gate per key channel, walks that read three tiles of keys and queries.
CHANNEL_FORWARD = Rates({1: 1.4, 2: 1.9}, {1: 1.1, 2: 1.45})
CHANNEL_TRAINING = Rates({1: 1.75, 2: 2.6}, {1: 1.1, 2: 1.45})
CHANNEL_BACKWARD = Rates({1: 1.95, 2: 2.4}, {1: 1.3, 2: 1.85})
BACKWARD = Rates({1: 1.5, 2: 1.85}, {1: 0.98, 2: 1.4})
# With a gate per head, whose transfers are the walks' own; all segments joined. Transfers with one
# tile were not timed.
GATED_TRAINING = Rates({1: 2.15, 2: 3.25}, {1: 1.3, 2: 1.45}, looks=8.0)
GATED_BACKWARD = Rates({1: 1.95, 2: 2.65}, {1: 1.6, 2: 1.9}, looks=8.0)


# Of a chunk and value head on one multiprocessor: of factors with such a gate, beside a walk as it
# is predicted here; and by dtype of the walk that makes them, in one kernel: so that 80 heads of
# 8192 tokens take it in bfloat16, the fewest for which it was timed and is faster. Measured on an
# H200; ragged sequences take it so much longer.
CHANNEL_FACTORS = 5.3
CHANNEL_WHOLE, RAGGED = {"bfloat16": 5.3, "float16": 7.6}, 1.1

# Chunks of the one kernel before a segment's own: of gates of mean -1 the lead, and what its roles
# are apart. A lead has at most so many, as sm90/channel_leads.cu counts them.
LEAD, APART, LONGEST_LEAD = 3, 2, 8
# Microseconds on an H200 of what comes beside such a walk, and of what a declined call loses; of
# the predicted time without, at least what is to be gained and at most what may be lost.
CUT_LAUNCHES, DECLINED = 12.0, 8.0
GAIN, LOSS = 0.05, 0.05


class Cut(NamedTuple):
    """Into how many segments a sequence is cut, and the chunks of the first and of others.

    The last one has what is left.
    """

    segments: int
    first: int
    length: int


# Of walks that start late, on an H200: microseconds of what says where they start and of launches
# that leave; and what all this takes where sequences are walked otherwise.
STARTS, LEAVE, NOT_LATE = 8.0, 3.0, 7.0
# Segments; lengths of the first one, of which no chunk is walked twice; blocks one after the other;
# how many chunks early the choice counts on, and at least can be; the least to be gained.
LATE_SEGMENTS, LATE_PERCENTS, LATE_ROUNDS = range(2, 17), range(50, 201, 5), 2
TYPICAL, LEAST, LATE_GAIN = 8, 16, 0.1


class Late(NamedTuple):
    """How a walk is divided whose segments start from nothing.

    Up to `most` chunks early: beyond, what other divisions do takes less time.
    """

    value_tiles: int
    segments: int
    most: int
    first_percent: int = 100


class Choice(NamedTuple):
    """How a walk is divided.

    Tiles of 64 value channels per block, segments per sequence, and tiles per block of a transfer.
    With `concurrent` the first segment, whose state is known, is walked beside the transfers of
    others, with so many tiles per block, and has `first_percent` of the others' length. With
    `reuse_x` the walk is given X by the transfers, but for the last segment, which has
    `last_percent`. Sequences that gates make forget have another division, `late`.
    """

    value_tiles: int
    segments: int = 1
    transfer_tiles: int = 1
    concurrent: int = 0
    first_percent: int = 100
    reuse_x: bool = False
    last_percent: int = 100
    late: Late | None = None


def choose_forward(call: Call, facts: DeviceFacts) -> Choice:
    """Choose for `chunk_delta_rule`."""
    choice = cheapest(call, facts, FORWARD)
    return choice._replace(late=choose_late(call, facts, choice))


def choose_late(call: Call, facts: DeviceFacts, other: Choice) -> Late | None:
    """Choose for sequences that gates make forget, if they take less time than by `other`.

    Not on a pool that the other's walk writes to itself: a last segment would come to a slot before
    the first one has read it.
    """
    whole_on_pool = call.pool_dtype is not None and other.segments == 1
    if call.gate != "scalar" or call.checkpoint_every is not None or whole_on_pool:
        return None
    chunks, pairs = chunks_per_sequence(call), call.N * call.HV
    limit = cost(other, call, facts, GATED, 0.0)
    if limit * LOSS < NOT_LATE:
        return None
    overhead = STARTS + LEAVE * (1 if other.segments == 1 else 3)
    percents = other.first_percent, other.last_percent
    latest = chunks if other.segments == 1 else begins(chunks, other.segments, *percents)[0]
    best, least = None, (1 - LATE_GAIN) * limit
    for tiles, segments in product((1,) if call.V <= BOX else (2, 1), LATE_SEGMENTS):
        rounds = -(-pairs * segments * slices_of(call.V, tiles) // facts.sm_count)
        if rounds > LATE_ROUNDS:
            continue
        rate = rounds * GATED.walk[tiles]
        for percent in LATE_PERCENTS:
            first, length = begins(chunks, segments, percent)
            time = overhead + rate * max(first, length + TYPICAL)
            most = int((limit - overhead) / rate) - length
            if min(first, most) >= LEAST and first <= latest and time < least:
                best, least = Late(tiles, segments, most, percent), time
    return best


def begins(chunks: int, segments: int, first: int, last: int = 100) -> tuple[int, int]:
    """Return at which chunk the second of several segments begins, and how many each has."""
    whole = 100 * (segments - 2) + first + last
    length = -(-100 * chunks // whole)
    return max(chunks - (segments - 2) * length - last * length // 100, 0), length


def choose_training(call: Call, facts: DeviceFacts) -> Choice:
    """Choose for the walk that leaves what the gradients read: states, o and corrections."""
    rates = GATED_TRAINING if has_gated_rates(call) else TRAINING
    return cheapest(call, facts, rates, traffic(call, written_rows=2))


def choose_backward(call: Call, facts: DeviceFacts) -> Choice:
    """Choose for the reverse walk, which writes gradients of states and G."""
    rates = CHANNEL_BACKWARD if call.gate == "channel" else BACKWARD
    if has_gated_rates(call):
        rates = GATED_BACKWARD
    return cheapest(call, facts, rates, traffic(call, written_rows=1))


def has_gated_rates(call: Call) -> bool:
    """Whether walks of training go by rates with a gate: timed for sequences of so many chunks."""
    return call.gate == "scalar" and chunks_per_sequence(call) >= 64


def choose_channel_forward(call: Call, facts: DeviceFacts) -> Choice:
    """Choose for `chunk_delta_rule` with a gate per key channel."""
    return cheapest(call, facts, CHANNEL_FORWARD, traffic(call, written_rows=1, states=False))


def choose_channel_training(call: Call, facts: DeviceFacts) -> Choice:
    """Choose for the walk with such a gate that leaves what the gradients read."""
    return cheapest(call, facts, CHANNEL_TRAINING, traffic(call, written_rows=2))


def takes_whole(call: Call, facts: DeviceFacts) -> bool:
    """Return whether `chunk_delta_rule` with such a gate takes least time in one kernel."""
    return whole_cost(call, facts) < walked_cost(call, facts)


def whole_cost(call: Call, facts: DeviceFacts) -> float:
    """Return the predicted microseconds of the one kernel."""
    rounds = -(-call.N * call.HV // facts.sm_count)
    return rounds * (chunks_per_sequence(call) + APART) * CHANNEL_WHOLE[call.dtype.name]


def longest_whole(call: Call, facts: DeviceFacts) -> int:
    """Return how many chunks the longest of ragged sequences may have for the one kernel.

    So that it is predicted to take less time than factors and walks; 0 if it does not where all
    have the same length. Of more blocks than multiprocessors, one of the longest begins when others
    are done: beside the load of a multiprocessor half of it counts, or as much as with equal ones.
    """
    others, chunks, blocks = walked_cost(call, facts), chunks_per_sequence(call), call.N * call.HV
    if LOSS * others < DECLINED:
        return 0
    most = (others - DECLINED) / (RAGGED * CHANNEL_WHOLE[call.dtype.name]) - APART
    if blocks > facts.sm_count:
        turns = blocks / facts.sm_count
        most = min(most, (most - turns * chunks) / max(0.5, math.ceil(turns) - turns))
    return int(most) if most > chunks else 0


def walked_cost(call: Call, facts: DeviceFacts) -> float:
    """Return those of factors and walks with them."""
    choice, least = choose_channel_forward(call, facts), traffic(call, written_rows=1, states=False)
    factors = call.N * call.HV * chunks_per_sequence(call) * CHANNEL_FACTORS / facts.sm_count
    return LAUNCH + factors + cost(choice, call, facts, CHANNEL_FORWARD, least)


def choose_cut(call: Call, facts: DeviceFacts) -> Cut | None:
    """Choose segments for the one kernel that begin from zero, if that is predicted to gain."""
    others = min(whole_cost(call, facts), walked_cost(call, facts))
    cuts = {cut: cut_cost(cut, call, facts) for cut in cuts_of(chunks_per_sequence(call))}
    best = min(cuts, key=lambda cut: cuts[cut], default=None)
    gains = best is not None and cuts[best] < (1 - GAIN) * others
    return best if gains and LOSS * others > DECLINED else None


def cuts_of(chunks: int) -> Iterator[Cut]:
    """Yield the cuts of a sequence: the first segment is about as long as others with a lead."""
    for count in range(2, chunks // LONGEST_LEAD + 1):
        for length in sorted({(chunks - LEAD) // count, -(-(chunks - LEAD) // count)}):
            first = chunks - (count - 1) * length
            if first >= LONGEST_LEAD:
                yield Cut(count, first, length)


def cut_cost(cut: Cut, call: Call, facts: DeviceFacts) -> float:
    rounds = -(-call.N * call.HV * cut.segments // facts.sm_count)
    longest = max(cut.first, cut.length + LEAD)
    return CUT_LAUNCHES + rounds * (longest + APART) * CHANNEL_WHOLE[call.dtype.name]


def cheapest(call: Call, facts: DeviceFacts, rates: Rates, least: float = 0.0) -> Choice:
    """Return the choice of the least time by some rates; no walk takes less than `least`."""
    return min(choices(call, rates), key=lambda choice: cost(choice, call, facts, rates, least))


def choices(call: Call, rates: Rates) -> Iterator[Choice]:
    """Yield what there is to choose from."""
    # Two tiles leave no registers in which gated states could be brought to true units.
    narrow = call.V <= BOX or (call.gate is not None and call.checkpoint_every is not None)
    widths = (1,) if narrow else (2, 1)
    for tiles in widths:
        yield Choice(tiles)
        if call.checkpoint_every is not None:
            continue  # the bits after a checkpoint do not depend on what came before
        for segments, transfer in product(SEGMENTS[1:], widths):
            choice = Choice(tiles, segments, transfer)
            # Walks with two tiles do not wait for their solver: to be given X costs them time.
            given = rates.given_walk and takes_x(call)
            if given and tiles == 1 and transfer_cluster(call, transfer) > 1:
                percent = round(100 * rates.given_walk / rates.walk[1])
                choice = choice._replace(reuse_x=True, last_percent=percent)
            yield choice
            if rates.concurrent_walk and segments > 2:
                for first in widths:
                    percent = round(100 * rates.transfer[transfer] / rates.concurrent_walk[first])
                    yield choice._replace(concurrent=first, first_percent=percent)


def takes_x(call: Call) -> bool:
    """Return whether a walk has room for X of its transfers: not if all its chunks are paired."""
    return call.gate is None or call.dtype.name != "float16"


def cost(choice: Choice, call: Call, facts: DeviceFacts, rates: Rates, least: float) -> float:
    """Return the predicted microseconds of a walk and what comes before it."""
    chunks = chunks_per_sequence(call)
    pairs = call.N * call.HV

    def rounds(blocks: int) -> int:
        return -(-blocks // facts.sm_count)

    walked = choice.segments - (choice.concurrent > 0)
    blocks = pairs * walked * slices_of(call.V, choice.value_tiles)
    rate = rates.given_walk if choice.reuse_x else rates.walk[choice.value_tiles]
    if choice.segments == 1:
        return max(least, rounds(blocks) * chunks * rate)
    lengths = 100 * (choice.segments - 2) + choice.first_percent + choice.last_percent
    length = -(-100 * chunks // lengths)
    time = max(least, rounds(blocks) * length * rate)
    blocks = pairs * (walked - 1) * transfer_slices(call, choice.transfer_tiles)
    before = rates.transfer[choice.transfer_tiles] * length
    if choice.concurrent and rates.concurrent_walk:
        others = (choice.segments - 2) * length + choice.last_percent * length // 100
        first = max(0, chunks - others)
        before = max(before, rates.concurrent_walk[choice.concurrent] * first)
        blocks += pairs * slices_of(call.V, choice.concurrent)
        time += CONCURRENT
    return time + rounds(blocks) * before + LAUNCH + rates.looks + JOIN * (walked - 1)


def traffic(call: Call, written_rows: int, states: bool = True) -> float:
    """Return the microseconds for what a walk with factors given moves.

    Per chunk and value head: keys, rows of values and factors, a state.
    """
    keys = 3 if call.gate == "channel" else 2 / call.groups
    rows = keys * call.K + (1 + written_rows) * call.V + 2 * CHUNK
    size = (CHUNK * rows + states * call.K * call.V) * call.dtype.itemsize
    return call.N * call.HV * chunks_per_sequence(call) * size / BANDWIDTH


def chunks_per_sequence(call: Call) -> int:
    return max(1, -(-call.B * call.T // (CHUNK * max(1, call.N))))
