"""Timing on a machine that is not quiet: two contestants in turn, so that drift hits both, and ratios instead of times; and calls
on a GPU, whose time is that between two events."""
import statistics
import time

SETTLE = 0.02   # seconds


def once(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeated(call, n):
    """A call of n in a row."""
    def calls():
        for _ in range(n):
            call()
    return call if n == 1 else calls


def alternate(ours, theirs, seconds=2.0, least=5, most=200):
    """Runs the two in turn for about `seconds`; medians in seconds, and the ratio theirs/ours as median, low and high quartile.

    Each timed call follows untimed ones of the same contestant: the other's idle threads spin for a while before they
    sleep (OpenMP's do, for milliseconds), and would take a core from whoever comes next.

    theirs may be None: then only ours is timed and the ratio is None.
    """
    calls = [ours] + ([theirs] if theirs else [])
    for call in calls:
        call()
    times, start = [], time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - start < seconds):
        order = calls if len(times) % 2 == 0 else calls[::-1]
        taken = {}
        for call in order:
            settled = time.perf_counter() + SETTLE
            call()
            while time.perf_counter() < settled:
                call()
            taken[id(call)] = once(call)
        times.append([taken[id(call)] for call in calls])
    columns = list(zip(*times, strict=True))
    mine = statistics.median(columns[0])
    if theirs is None:
        return mine, None, None
    ratios = statistics.quantiles([b / a for a, b in times], n=4)
    return mine, statistics.median(columns[1]), (ratios[1], ratios[0], ratios[2])


def queued(call):
    """Seconds of one call on the GPU."""
    import torch
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turn(calls, rounds):
    """Median seconds of each named call over as many rounds, in alternating order."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for n in range(rounds):
        for name in list(calls)[:: 1 if n % 2 == 0 else -1]:
            times[name].append(queued(calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}
