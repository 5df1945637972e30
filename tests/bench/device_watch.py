"""What the driver says about the GPUs while somebody else works on them: memory in use, and how much of the time a kernel ran."""
import threading
import time

EVERY_SECONDS = 0.1


class DeviceWatch:
    """Samples from a thread of its own until close(). Without a GPU or without NVIDIA's Python bindings it knows nothing and says so by None."""

    def __init__(self):
        self.samples = []  # (time.time(), [bytes in use of each device], [busy percent of each device])
        self.devices, self.machine = [], {}
        self.closed = threading.Event()
        self.thread = None
        try:
            import pynvml
            pynvml.nvmlInit()
        except Exception as error:  # whatever is missing: library, driver, device
            self.machine["gpus"] = f"none seen: {error}"
            return
        self.nvml = pynvml
        self.devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        text = lambda value: value.decode() if isinstance(value, bytes) else value
        self.machine = {"gpus": [text(pynvml.nvmlDeviceGetName(device)) for device in self.devices], "driver": text(pynvml.nvmlSystemGetDriverVersion())}
        self.baseline = self.in_use()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def in_use(self):
        return [int(self.nvml.nvmlDeviceGetMemoryInfo(device).used) for device in self.devices]

    def watch(self):
        while not self.closed.wait(EVERY_SECONDS):
            try:
                self.samples.append((time.time(), self.in_use(), [self.nvml.nvmlDeviceGetUtilizationRates(device).gpu for device in self.devices]))
            except self.nvml.NVMLError:
                continue  # one sample less

    def figures(self, begin, end, peaks):
        """What was seen from `begin` to `end`, for a result's line: "gpu_busy" of each device, and "peak_gib", which is `peaks` and the memory of each "device" over
        what was in use before anything was measured. Empty where nobody looked."""
        found = [(used, busy) for at, used, busy in self.samples if begin <= at <= end]
        if not found:
            return {}
        used, busy = zip(*found)
        peak = [max(column) - base for column, base in zip(zip(*used), self.baseline)]
        return {"gpu_busy": [round(sum(column) / len(column) / 100, 3) for column in zip(*busy)],
                "peak_gib": {**peaks, "device": [round(bytes_ / 2**30, 2) for bytes_ in peak]}}

    def close(self):
        self.closed.set()
        if self.thread is not None:
            self.thread.join()
