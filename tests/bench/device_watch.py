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

    def peak_bytes(self, begin, end):
        """Of each device, over what was in use before anything was measured; None where nobody looked."""
        found = [used for at, used, _ in self.samples if begin <= at <= end]
        return [max(column) - base for column, base in zip(zip(*found), self.baseline)] if found else None

    def busy_share(self, begin, end):
        found = [busy for at, _, busy in self.samples if begin <= at <= end]
        return [round(sum(column) / len(column) / 100, 3) for column in zip(*found)] if found else None

    def close(self):
        self.closed.set()
        if self.thread is not None:
            self.thread.join()
