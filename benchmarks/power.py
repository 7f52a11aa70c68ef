"""Attention at the power limit of one NVIDIA GPU: ours, cuDNN and FlashAttention-2 in turn, by dtype and by what tensors hold.

    python benchmarks/power.py [--length 4096] [--heads 32 8] [--seconds 0.4] [--rounds 3]

A tensor core takes more power the more bits of its operands change, and a card at its limit lowers its clock. Values: normal, the
same rounded to what bfloat16 holds, zeros. A line gives for each dtype the speed of one launch after a pause and of launches back
to back in the steady state, the clock of the multiprocessors and the power there, as NVML has them, and float16 / bfloat16 of
both speeds: where rounded values take the gap between the dtypes away, power makes it and not the code.
"""
import argparse
import ctypes
import statistics
import threading
import time

import counting
import gpu
import peers
import shapes
import timing

VALUES = {"normal": lambda x: x, "rounded": lambda x: x.bfloat16().float(), "zeros": lambda x: 0 * x}
CLOCK_SM, POWER_INSTANT = 1, 186      # of nvml.h
PAUSE, PERIOD = 0.012, 0.004          # seconds before a single launch, between samples


class FieldValue(ctypes.Structure):
    """nvmlFieldValue_t; of `value` the half that an unsigned int takes."""
    _fields_ = [(name, ctypes.c_uint) for name in ("field", "scope")] + [(name, ctypes.c_longlong) for name in ("at", "latency")]
    _fields_ += [("type", ctypes.c_uint), ("error", ctypes.c_int), ("value", ctypes.c_uint), ("rest", ctypes.c_uint)]


class Sampler:
    """Clock (MHz) and power (W) of the first GPU, again and again between begin() and medians()."""

    def __init__(self):
        self.nvml, self.device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self.check(self.nvml.nvmlInit_v2())
        self.check(self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device)))

    @staticmethod
    def check(error):
        if error:
            raise SystemExit(f"NVML: error {error}")

    def sample(self):
        clock, power = ctypes.c_uint(), FieldValue(field=POWER_INSTANT)
        self.check(self.nvml.nvmlDeviceGetClockInfo(self.device, CLOCK_SM, ctypes.byref(clock)))
        self.check(self.nvml.nvmlDeviceGetFieldValues(self.device, 1, ctypes.byref(power)) or power.error)
        return clock.value, power.value / 1e3

    def begin(self):
        self.samples, self.ended = [self.sample()], threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.ended.wait(PERIOD):
            self.samples.append(self.sample())

    def medians(self):
        self.ended.set()
        self.thread.join()
        return [statistics.median(column) for column in zip(*self.samples, strict=True)]


def steady(call, seconds, sampler):
    """Seconds of a call, clock and power in the second half of that many seconds of calls back to back."""
    import torch
    count = max(4, int(seconds / timing.queued(call) / 2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    events[0].record()
    for event in events[1:]:
        for _ in range(count):
            call()
        event.record()
    events[1].synchronize()
    sampler.begin()
    events[2].synchronize()
    return events[1].elapsed_time(events[2]) / 1e3 / count, *sampler.medians()


def measure(calls, options, sampler):
    """Of each call the medians of: one launch, a launch of many, clock, power."""
    single, many = ({name: [] for name in calls} for _ in range(2))
    for call in calls.values():
        call()
    for found, time_of in ((single, timing.queued), (many, lambda call: steady(call, options.seconds, sampler))):
        for n in range(options.rounds):
            for name in list(calls)[:: 1 if n % 2 == 0 else -1]:
                time.sleep(PAUSE)
                found[name].append(time_of(calls[name]))
    return {name: [statistics.median(single[name]), *map(statistics.median, zip(*many[name], strict=True))] for name in calls}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="of queries, of keys")
    parser.add_argument("--seconds", type=float, default=0.4, help="of launches back to back")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import torch
    rivals, sampler, dtypes = gpu.contestants(), Sampler(), ("bfloat16", "float16")
    shape = f"{options.heads[0]}/{options.heads[1]} d 128 s {options.length} dense"
    print(f"{torch.cuda.get_device_name()}, {shape}, TFLOP/s of one launch, of launches back to back")
    for kind, change in VALUES.items():
        calls = {}
        for dtype in dtypes:
            row = shapes.Row(dtype, max(1, 16384 // options.length), *options.heads, options.length, 128)
            inputs = [change(x.float()).to(getattr(torch, dtype)) for x in peers.tensors(row._replace(dtype="float32"))]
            calls |= {(name, dtype): peer.calls(row, *inputs)[0] for name, peer in rivals.items()}
        found, rate = measure(calls, options, sampler), counting.flops(row, "forward") / 1e12
        for name in rivals:
            both = [found[name, dtype] for dtype in dtypes]
            text = "   ".join(f"{dtype} {rate / one:4.0f} {rate / many:4.0f}, {clock:4.0f} MHz {power:3.0f} W"
                              for dtype, (one, many, clock, power) in zip(dtypes, both, strict=True))
            print(f"{kind:8s} {name:8s} {text}   ratio {both[0][0] / both[1][0]:.3f} {both[0][1] / both[1][1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
