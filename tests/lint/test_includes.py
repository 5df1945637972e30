import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from include_rules import violations
from sources import ROOT, sources


def test_every_file_includes_only_what_its_room_may():
    files = [path for path in sources(".h", ".cc", ".cu", ".cuh") if path.split("/")[0] in ("common", "coordinator", "worker", "clients")]
    assert len(files) > 10
    found = [line for path in files for line in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path, text", [
    ("common/spec/spec.cc", '#include "coordinator/core/queue.h"'),
    ("common/net/channel.cc", '#include "worker/agent/link.h"'),
    ("coordinator/service/jobs.cc", '#include "worker/agent/link.h"'),
    ("clients/ppctl/main.cc", '#include "coordinator/core/queue.h"'),
    ("worker/agent/link.cc", '#include "worker/trainer/engine/step.h"'),
    ("coordinator/core/queue.cc", '#include "coordinator/store/job_store.h"'),
    ("coordinator/controller.cc", "#include <ATen/core/Tensor.h>"),
    ("coordinator/store/store.cc", "#include <grpcpp/grpcpp.h>"),
    ("coordinator/core/queue.h", '#include "ppft/v1/job.grpc.pb.h"'),
    ("coordinator/controller.h", "#include <sqlite3.h>"),
    ("worker/agent/main.cc", "#include <prometheus/counter.h>"),
    ("common/pipeline/schedule.cc", "#include <fstream>"),
    ("common/data/packing.cc", "#  include <thread>"),
    ("coordinator/core/queue.cc", '#include "absl/time/clock.h"'),
    ("coordinator/core/queue.cc", '#include "common/base/files.h"'),
    ("worker/trainer/engine/step.cc", '#include <ATen/core/Tensor.h>\n#include "ppft/v1/trainer.pb.h"'),
    ("coordinator/prepare/main.cc", '#include "ppft/v1/job.pb.h"'),
])
def test_a_wrong_include_is_found(path, text):
    assert violations(path, text)


@pytest.mark.parametrize("path, text", [
    ("coordinator/store/store.cc", '#include <sqlite3.h>\n#include "coordinator/core/states.h"\n#include "ppft/v1/job.pb.h"'),
    ("worker/trainer/model/linear.cc", '#include <ATen/core/Tensor.h>\n#include "common/base/status.h"'),
    ("common/pipeline/schedule.cc", '#include <vector>\n#include "absl/strings/str_cat.h"'),
    ("coordinator/core/queue.cc", '#include "absl/time/time.h"\n#include "common/pipeline/schedule.h"'),
])
def test_a_right_include_passes(path, text):
    assert not violations(path, text)
