"""Which folder may include what: the rooms of the house, and the outside things that only some of them may touch.

Includes point one way: proto <- common <- {coordinator, worker, clients}. The compiler cannot hold that line, since system headers are visible to all.
"""
import re

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^">]+)[">]', re.M)
HOUSES = ("common", "coordinator", "worker", "clients", "tests")

# folder -> folders of this project that its files may include; the longest folder that fits a file decides. Generated code (ppft/v1) is open to all.
ROOMS = {
    "common": ["common"],
    "common/base": ["common/base"],
    "common/pipeline": ["common/pipeline", "common/base"],
    "common/data": ["common/data", "common/base"],
    "common/text": ["common/text", "common/base"],
    "coordinator": ["coordinator", "common"],
    "coordinator/core": ["coordinator/core", "common"],
    "coordinator/store": ["coordinator/store", "coordinator/core", "common"],
    # Uploads and downloads stream straight between gRPC and files; what they decide goes through the faces of controller, store and worker files.
    "coordinator/artifacts": ["coordinator/artifacts", "coordinator/core", "coordinator/controller.h", "coordinator/store/job_store.h",
                              "coordinator/service/worker_files.h", "common"],
    "coordinator/prepare": ["coordinator/prepare", "common"],
    "worker": ["worker", "common"],
    "worker/agent": ["worker/agent", "worker/trainer/beat.h", "common"],  # beat.h: the page that the two share
    "worker/trainer": ["worker/trainer", "common"],
    "clients": ["clients", "common"],
}

# Outside things: (name, headers, folders or files that may include them).
EDGES = [
    ("LibTorch", r"(torch|ATen|c10|caffe2)/", ["worker/trainer"]),
    ("gRPC", r"grpc(pp|\+\+)?/|.*\.grpc\.pb\.h$",
     ["common/net", "coordinator/service", "coordinator/artifacts", "coordinator/main.cc", "coordinator/coordinator.h", "coordinator/coordinator.cc", "worker/agent", "clients"]),
    ("SQLite", r"sqlite3?(ext)?\.h$", ["coordinator/store"]),
    ("prometheus-cpp", r"prometheus/", ["common/metrics"]),
    ("yaml-cpp", r"yaml-cpp/", ["common/spec", "clients"]),
    ("CLI11", r"CLI/", ["clients", "coordinator/main.cc", "coordinator/prepare", "worker/agent", "worker/trainer"]),
    ("CUDA", r"(cuda|nccl|cudnn|cublas)[a-z_0-9A-Z]*(\.h|/)", ["worker/trainer/cuda", "worker/trainer/kernels/cuda", "worker/trainer/comm/nccl"]),
    ("SentencePiece", r"sentencepiece", ["common/text"]),
]

# Rooms without I/O, clocks, threads.
PURE = ["common/pipeline", "common/data", "coordinator/core"]
IMPURE = re.compile(
    r"(fstream|iostream|filesystem|thread|mutex|shared_mutex|condition_variable|future|chrono|ctime|time\.h|random_device|unistd\.h|fcntl\.h|poll\.h|netdb\.h|dlfcn\.h)$"
    r"|(sys|netinet|arpa|linux)/|absl/(synchronization/|time/clock\.h)|common/(base/(files|logging|process)|net/|metrics/|text/)")

# One protobuf a process, and none beside these.
NO_PROTOBUF = ["common/text", "coordinator/prepare", "worker/trainer/model", "worker/trainer/kernels"]
PROTOBUF = re.compile(r"google/protobuf/|.*\.pb\.h$")
TORCH = re.compile(EDGES[0][1])


def within(path, folder):
    return path == folder or path.startswith(folder + "/")


def violations(path, text):
    """Sentences about what the file at `path` (from the repository's root) includes and must not."""
    found = []
    includes = INCLUDE.findall(text)
    rooms = [room for room in ROOMS if within(path, room)]
    allowed = ROOMS[max(rooms, key=len)] if rooms else []
    for header in includes:
        if header.split("/")[0] in HOUSES and "/" in header and not any(within(header, folder) for folder in allowed):
            found.append(f"{path}: includes {header}; its room may include only {', '.join(allowed)}")
        for name, pattern, places in EDGES:
            if re.match(pattern, header) and not any(within(path, place) for place in places):
                found.append(f"{path}: includes {header}; {name} belongs to {', '.join(places)}")
        if any(within(path, room) for room in PURE) and IMPURE.match(header):
            found.append(f"{path}: includes {header}; a pure room knows no I/O, clock or thread")
        if any(within(path, room) for room in NO_PROTOBUF) and PROTOBUF.match(header):
            found.append(f"{path}: includes {header}; protobuf stays out of {', '.join(NO_PROTOBUF)}")
    if any(map(TORCH.match, includes)) and any(map(PROTOBUF.match, includes)):
        found.append(f"{path}: includes LibTorch and protobuf; each file has one of them")
    return found
